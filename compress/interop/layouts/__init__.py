"""One layout of another tool per file."""
