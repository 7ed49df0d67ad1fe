"""Lab 05: quantization and GPTQ."""
