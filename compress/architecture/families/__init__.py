"""One file per maker of models."""
