"""The output layer and its cross entropy together, without ever holding all logits.

The logits of some thousand tokens at a time are computed, overwritten by their gradient, and
multiplied into the gradients of the hidden states and of the weight: three GEMMs, as in the usual
way, but all in the forward pass. The two gradients are kept, and scaled in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops.cross_entropy import IGNORE_INDEX

# Large blocks make GEMMs fast and add up the weight's gradient in few roundings; 2^29 logits are
# 1 GiB in bf16.
_MAX_LOGITS = 2**29


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over tokens of −log softmax(weight · x)[label]: scalar fp32.

    x_TD, weight_VD: of one dtype; logits are rounded to it, the softmax is fp32 (fp64 stays fp64).
    labels_T: int64; tokens with `IGNORE_INDEX` don't count.
    """
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        T, V = x_TD.size(0), weight_VD.size(0)
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        grad_weight_VD = None
        loss = torch.zeros((), dtype=_loss_dtype(x_TD), device=x_TD.device)
        for start, stop in _blocks(T, V):
            x, labels = x_TD[start:stop], labels_T[start:stop]
            logits = x @ weight_VD.t()
            loss += _cross_entropy_(logits, labels, with_grad=needs_x or needs_weight)
            if grad_x_TD is not None:
                torch.mm(logits, weight_VD, out=grad_x_TD[start:stop])
            if needs_weight:
                if grad_weight_VD is None:
                    grad_weight_VD = logits.t() @ x
                else:
                    grad_weight_VD.addmm_(logits.t(), x)
            del logits
        ctx.grads = grad_x_TD, grad_weight_VD
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grads, ctx.grads = ctx.grads, None  # scaled in place, so usable for one backward pass
        if grads is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once")
        return *(g if g is None else _scale_(g, grad_loss) for g in grads), None


def _scale_(x: Tensor, factor: Tensor) -> Tensor:
    if not x.is_cuda or x.dtype == torch.float64:
        return x.mul_(factor)
    # torch's product of bf16 and an fp32 scalar tensor reaches a fifth of the memory bandwidth.
    from torchtitan.ops import cross_entropy_triton

    return cross_entropy_triton.scale_(x, factor)


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(T: int, V: int) -> list[tuple[int, int]]:
    """Split T tokens into as few equal blocks as have at most `_MAX_LOGITS` logits each."""
    count = max(1, -(-T * V // _MAX_LOGITS))
    size = -(-T // count)
    size = -(-size // 128) * 128  # whole tiles
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _cross_entropy_(logits_TV: Tensor, labels_T: Tensor, *, with_grad: bool) -> Tensor:
    """Sum of the losses.

    with_grad: overwrite the logits with the sum's gradient.
    """
    if logits_TV.is_cuda and logits_TV.dtype != torch.float64:
        from torchtitan.ops import cross_entropy_triton

        losses_T = cross_entropy_triton.cross_entropy_(logits_TV, labels_T, IGNORE_INDEX, with_grad)
        return losses_T.sum()
    log_probs_TV = logits_TV.to(_loss_dtype(logits_TV)).log_softmax(dim=-1)
    loss = F.nll_loss(log_probs_TV, labels_T, ignore_index=IGNORE_INDEX, reduction="sum")
    if with_grad:
        valid_T1 = (labels_T != IGNORE_INDEX).unsqueeze(1)
        probs_TV = log_probs_TV.exp_()
        probs_TV.scatter_add_(1, labels_T.clamp(min=0).unsqueeze(1), -valid_T1.to(probs_TV.dtype))
        logits_TV.copy_(probs_TV.mul_(valid_T1))
    return loss
