"""What changes the weights: update rules, their groups, learning rate, average, dtype copies."""

from torchtitan.components.optimizer.build import build_optimizer, group_rules

__all__ = ["build_optimizer", "group_rules"]
