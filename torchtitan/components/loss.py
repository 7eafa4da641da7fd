"""Cross entropy as a sum over tokens.

The trainer divides the sum once by the valid tokens of the whole optimizer step, over all ranks and
micro-batches, so that neither accumulation nor data parallelism needs a correction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
