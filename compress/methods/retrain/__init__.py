"""One way of training what pruning or rounding left per file."""
