"""Cross entropy of a block of logits, which its gradient overwrites, in Triton; reference:
ops/linear_cross_entropy.py.

One program a token. The row (258 KB at V = 129,280) is read twice, the second time from L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cross_entropy(
    logits,
    labels,
    losses,
    log_sums,
    V: tl.constexpr,
    ignore,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    label = tl.load(labels + token)
    valid = label != ignore
    top = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top))
        top = new_top
    log_sum = top + tl.log(total)
    target = tl.load(row + tl.where(valid, label, 0)).to(tl.float32)
    tl.store(losses + token, tl.where(valid, log_sum - target, 0.0))
    tl.store(log_sums + token, log_sum)
    if WITH_GRAD:
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(row + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - log_sum) - tl.where(cols == label, 1.0, 0.0)
            grad = tl.where(valid, grad, 0.0)
            tl.store(row + cols, grad.to(logits.dtype.element_ty), mask=cols < V)


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, ignore: int, with_grad: bool) -> Tensor:
    """Losses (T,) fp32, 0 where the label is `ignore`.

    with_grad: overwrite the logits with the gradient of the losses' sum.
    """
    return _launch(logits_TV, labels_T, ignore, with_grad)[0]


def losses_and_log_sums(logits_TV: Tensor, labels_T: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """The losses, and the logarithm of each token's sum of exponentials: (T,) fp32 both."""
    return _launch(logits_TV, labels_T, ignore, False)


def _launch(
    logits_TV: Tensor, labels_T: Tensor, ignore: int, with_grad: bool
) -> tuple[Tensor, Tensor]:
    T, V = logits_TV.shape
    losses_T, log_sums_T = torch.empty(2, T, dtype=torch.float32, device=logits_TV.device)
    if T:
        block = min(8192, triton.next_power_of_2(V))
        _cross_entropy[(T,)](
            logits_TV,
            labels_T,
            losses_T,
            log_sums_T,
            V=V,
            ignore=ignore,
            WITH_GRAD=with_grad,
            BLOCK=block,
            num_warps=16 if block >= 4096 else 4,
        )
    return losses_T, log_sums_T


@triton.jit
def _scale(x, factor, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(x + at, scaled.to(x.dtype.element_ty), mask=at < N)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply x (contiguous) by a scalar tensor, in place."""
    N = x.numel()
    _scale[(triton.cdiv(N, 4096),)](x, factor, N, BLOCK=4096)
    return x
