"""Lab 09: distillation."""
