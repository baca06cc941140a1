"""One method of quantization per file."""
