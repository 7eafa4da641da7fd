"""What a run tells of itself: numbers, their files, alarms, the guard of the loss."""

from torchtitan.components.metrics.logger import MetricsLogger

__all__ = ["MetricsLogger"]
