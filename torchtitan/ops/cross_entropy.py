"""Cross entropy as a sum over tokens, and the label that doesn't count."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Labels that count neither in the loss nor in its divisor: PyTorch's and Hugging Face's convention.
IGNORE_INDEX = -100


def cross_entropy_sum(
    logits_BSV: Tensor, labels_BS: Tensor, weights_BS: Tensor | None = None
) -> Tensor:
    """Sum of −log p(label) over all labels that are not `IGNORE_INDEX`: scalar, at least fp32.

    weights_BS: fp32, of the labels; None = 1.
    """
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    losses = F.cross_entropy(
        logits_BSV.flatten(0, 1).to(dtype),
        labels_BS.flatten(),
        reduction="sum" if weights_BS is None else "none",
        ignore_index=IGNORE_INDEX,
    )
    return losses if weights_BS is None else (losses * weights_BS.flatten()).sum()


def weights_by_document(labels_BS: Tensor, documents_BS: Tensor) -> Tensor:
    """Weights with which the labels of each document count as one together: (B, S) fp32.

    documents_BS: int64, the document of each token; −1 = padding.
    """
    counted_BS = labels_BS != IGNORE_INDEX
    ids_BS = documents_BS.clamp(min=0)
    sums_BS = torch.zeros_like(documents_BS).scatter_add_(1, ids_BS, counted_BS.long())
    return counted_BS / sums_BS.gather(1, ids_BS).clamp(min=1)
