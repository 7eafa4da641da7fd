"""Metrics of a run: numbers, their files, alarms, and the guard of the loss."""

from torchtitan.components.metrics.logger import MetricsLogger

__all__ = ["MetricsLogger"]
