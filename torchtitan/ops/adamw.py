"""One step of Adam or AdamW (arXiv 1412.6980, 1711.05101) of one tensor, in place.

Weights, gradient, states and working copy may differ in dtype: everything is computed in fp32 and
rounded once when stored.
"""

import torch
from torch import Tensor


@torch.no_grad()
def adamw_update(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    copy: Tensor | None = None,
    factor: Tensor | None = None,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Change `param`, `mean` and `square`, and `copy`, the parameter in another dtype, with them.

    factor: scalar tensor that the gradient is multiplied by (clipping). step: 1 in the first step.
    decoupled: AdamW's weight decay, otherwise Adam's. mean, square: contiguous; the others may be
    parts of a wider tensor, cut along one dim.
    """
    if param.numel() == 0:
        return
    scalars = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "decay": lr * weight_decay if decoupled else 0.0,
        "l2": 0.0 if decoupled else weight_decay,
        "correction1": 1 - betas[0] ** step,
        "correction2": 1 - betas[1] ** step,
    }
    if param.is_cuda:
        from torchtitan.ops import adamw_triton

        adamw_triton.update(param, grad, mean, square, copy, factor, **scalars)
    else:
        _update(param, grad, mean, square, copy, factor, **scalars)


def _update(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    copy: Tensor | None,
    factor: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    l2: float,
    correction1: float,
    correction2: float,
) -> None:
    g = grad.float() if factor is None else grad.float() * factor
    p, m, v = param.float(), mean.float(), square.float()
    g = g + l2 * p
    m = m + (g - m) * (1 - beta1)
    v = v + (g * g - v) * (1 - beta2)
    p = p * (1 - decay) - lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    for tensor, value in ((param, p), (mean, m), (square, v), (copy, p)):
        if tensor is not None:
            tensor.copy_(value)
