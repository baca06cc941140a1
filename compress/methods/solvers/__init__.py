"""What several methods share: grids, error feedback, masks, training."""
