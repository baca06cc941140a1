"""One adjustment of what is not a code per file."""
