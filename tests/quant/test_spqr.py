"""SpQR."""
