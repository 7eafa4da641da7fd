"""Parts that a trainer holds: checkpoints, optimizers, metrics, loss; they know no model."""
