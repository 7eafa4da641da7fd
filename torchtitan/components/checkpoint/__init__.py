"""Checkpoints of runs: saved, chosen, restored, converted from and to Hugging Face folders."""

from torchtitan.components.checkpoint.build import build_checkpoint_manager
from torchtitan.components.checkpoint.manager import CheckpointManager

__all__ = ["CheckpointManager", "build_checkpoint_manager"]
