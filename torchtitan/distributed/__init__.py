"""Parallelisms: tensors and modules spread over ranks. Nothing here knows a model class."""

from torchtitan.distributed.parallel_dims import ParallelDims

__all__ = ["ParallelDims"]
