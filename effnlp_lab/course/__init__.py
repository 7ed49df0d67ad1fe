"""The text and the models that every lab shares."""
