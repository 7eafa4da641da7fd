"""SwiGLU's gate (arXiv 2002.05202), with an optional weight per row."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Compute silu(gate) · up, each row times its weight, in the dtype of `gate`.

    The product with the next matrix is linear, so a weight applied here equals one applied to the
    layer's (wider) output.

    gate, up: (..., F).
    row_weights: (...,), usually fp32; None = no weights.
    """
    hidden = F.silu(gate) * up
    if row_weights is None:
        return hidden
    return (hidden * row_weights.unsqueeze(-1)).to(gate.dtype)
