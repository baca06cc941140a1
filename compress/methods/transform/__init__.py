"""One rewrite of a block before it is rounded per file."""
