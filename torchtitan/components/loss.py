"""Cross entropy as a sum over tokens.

The trainer divides the sum once by the valid tokens of the whole optimizer step, over all ranks and
micro-batches, so that neither accumulation nor data parallelism needs a correction.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from torchtitan.distributed import ParallelDims
from torchtitan.distributed.tensor_parallel import vocab_parallel_cross_entropy_sum
from torchtitan.ops.cross_entropy import IGNORE_INDEX, cross_entropy_sum


def build_loss(dims: ParallelDims, *, disable_loss_parallel: bool) -> Callable[..., Tensor]:
    """Choose the loss: `cross_entropy_sum`, or its twin for logits split over a TP group. Both take
    (logits, labels) and may take weights of the labels."""
    if dims.tp == 1 or disable_loss_parallel:
        return cross_entropy_sum
    group = dims.data_mesh["tp"].get_group()
    return partial(vocab_parallel_cross_entropy_sum, group=group, ignore_index=IGNORE_INDEX)
