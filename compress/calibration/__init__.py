"""Token ids, statistics of what linears read, and their cache."""
