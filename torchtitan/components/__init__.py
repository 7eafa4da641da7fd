"""Parts of a trainer: checkpoints, optimizers, metrics, loss. Nothing here knows a model class."""
