"""Whether a checkpoint is what was written: a second reader, checksums, a fresh process."""
