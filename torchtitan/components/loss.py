"""Cross entropy as a sum over tokens.

The trainer divides the sum once by the valid tokens of the whole optimizer step, over all ranks and
micro-batches, so that neither accumulation nor data parallelism needs a correction.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.distributed import ParallelDims
from torchtitan.distributed.tensor_parallel import vocab_parallel_cross_entropy_sum
from torchtitan.ops.linear_cross_entropy import IGNORE_INDEX


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum of −log p(label) over all labels that are not `IGNORE_INDEX`: scalar, at least fp32."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    return F.cross_entropy(
        logits_BSV.flatten(0, 1).to(dtype),
        labels_BS.flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
    )


def build_loss(
    dims: ParallelDims, *, disable_loss_parallel: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """`cross_entropy_sum` of whole logits, or of those that a TP group holds in parts."""
    if dims.tp == 1 or disable_loss_parallel:
        return cross_entropy_sum
    group = dims.data_mesh["tp"].get_group()
    return partial(vocab_parallel_cross_entropy_sum, group=group, ignore_index=IGNORE_INDEX)
