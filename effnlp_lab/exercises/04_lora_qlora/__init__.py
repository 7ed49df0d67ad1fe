"""Lab 04: LoRA and QLoRA."""
