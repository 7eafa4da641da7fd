"""Updates of the weights: optimizers, their groups, learning rate, average, compute weights."""

from torchtitan.components.optimizer.build import (
    build_optimizer,
    clip_gradients,
    group_rules,
    prepare_step,
    replay_steps,
)

__all__ = ["build_optimizer", "clip_gradients", "group_rules", "prepare_step", "replay_steps"]
