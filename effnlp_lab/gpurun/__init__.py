"""`effnlp gpu`: everything that is to be run on a GPU, step by step, each in a process of its own, and one report."""
