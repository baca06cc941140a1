"""The job folder and the way from parts to a published checkpoint."""
