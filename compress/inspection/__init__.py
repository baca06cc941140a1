"""What a checkpoint holds, what is wrong with it, what differs between two."""
