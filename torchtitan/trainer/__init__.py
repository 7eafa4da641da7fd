"""A run from its config to its last step: preflight, construction, loop, log."""

from torchtitan.trainer.trainer import Trainer

__all__ = ["Trainer"]
