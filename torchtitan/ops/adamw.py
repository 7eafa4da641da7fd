"""One step of Adam or AdamW (arXiv 1412.6980, 1711.05101) for one tensor, in place.

Weights, gradient, states and compute copy may differ in dtype: everything is computed in fp32 and
rounded once when stored.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchtitan.ops.fp8.weight import Fp8Weight


def step_numbers(step: int, lr: float, betas: tuple[float, float], decay: float) -> Tensor:
    """Numbers of an update that change from step to step: lr, lr · decay, 1 − beta1^step,
    1 − beta2^step (4,) fp32. A tensor, so that a recorded CUDA graph can read them.

    step: counted from 1.
    """
    return torch.tensor([lr, lr * decay, 1 - betas[0] ** step, 1 - betas[1] ** step])


@torch.no_grad()
def adamw_update(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers_4: Tensor,
    *,
    copy: Tensor | None = None,
    factor: Tensor | None = None,
    betas: tuple[float, float],
    eps: float,
    l2: float = 0.0,
) -> None:
    """Update `param`, `mean`, `square` and `copy` in place.

    param, grad, copy: may be parts of a wider tensor, cut along one dim.
    mean, square: running means of the gradient and of its square; contiguous.
    numbers_4: from `step_numbers`, on the parameter's device.
    copy: the parameter in another dtype, or None.
    factor: scalar tensor that the gradient is multiplied by (clipping), or None.
    l2: Adam's weight decay, added to the gradient.
    """
    if param.numel() == 0:
        return
    if param.is_cuda:
        update = _kernel(copy)
        update(param, grad, mean, square, numbers_4, copy, factor, betas=betas, eps=eps, l2=l2)
        return
    lr, decay, correction1, correction2 = numbers_4
    p, m, v = param.float(), mean.float(), square.float()
    g = (grad.float() if factor is None else grad.float() * factor) + l2 * p
    m = m + (g - m) * (1 - betas[0])
    v = v + (g * g - v) * (1 - betas[1])
    p = p * (1 - decay) - lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    for tensor, value in ((param, p), (mean, m), (square, v), (copy, p)):
        if tensor is not None:
            tensor.copy_(value)


def _kernel(copy: Tensor | None) -> Callable[..., None]:
    """Return the GPU's update for a copy of this kind."""
    if isinstance(copy, Fp8Weight):
        from torchtitan.ops.fp8 import kernels

        return kernels.adamw
    from torchtitan.ops import adamw_triton

    return adamw_triton.update
