"""One method of pruning per file."""
