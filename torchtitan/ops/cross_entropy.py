"""Cross entropy as a sum over tokens, and the label that doesn't count."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Labels that count neither in the loss nor in its divisor: PyTorch's and Hugging Face's convention.
IGNORE_INDEX = -100


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum of −log p(label) over all labels that are not `IGNORE_INDEX`: scalar, at least fp32."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    return F.cross_entropy(
        logits_BSV.flatten(0, 1).to(dtype),
        labels_BS.flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
    )
