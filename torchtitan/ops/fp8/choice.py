"""The choice between FP8's kernels and their emulation."""

from types import ModuleType

from torch import Tensor

from torchtitan.ops.fp8 import emulation


def functions(x: Tensor, emulate: bool) -> ModuleType:
    """Return the kernels, or their emulation."""
    if emulate or not x.is_cuda:
        return emulation
    from torchtitan.ops.fp8 import kernels

    return kernels
