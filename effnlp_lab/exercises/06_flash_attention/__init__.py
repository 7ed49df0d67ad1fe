"""Lab 06: flash attention."""
