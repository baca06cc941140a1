"""`compress cut`: heads, channels, experts, blocks; a plain checkpoint comes out."""
