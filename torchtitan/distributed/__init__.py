"""How tensors and modules spread over ranks. Knows no model class."""

from torchtitan.distributed.parallel_dims import ParallelDims

__all__ = ["ParallelDims"]
