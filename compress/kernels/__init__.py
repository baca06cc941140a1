"""x @ W.T from packed tensors, one kernel per file."""
