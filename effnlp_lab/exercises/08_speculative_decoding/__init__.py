"""Lab 08: speculative decoding."""
