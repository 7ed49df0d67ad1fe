"""Lab 03: accumulation and checkpointing."""
