"""The model of transformers on meta, filled block by block; experts as linears; families found by looking at modules."""
