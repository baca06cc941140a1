"""From a recipe to a checkpoint: prepare, estimate, pipeline, retraining, finish, rehearsal."""
