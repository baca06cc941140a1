"""The modules a loaded model consists of, and transformers' quantizer."""
