"""Checkpoints of runs: saved, chosen, restored, converted from and to Hugging Face folders."""

from torchtitan.components.checkpoint.manager import CheckpointManager, build_checkpoint_manager

__all__ = ["CheckpointManager", "build_checkpoint_manager"]
