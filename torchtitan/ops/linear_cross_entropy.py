"""The output layer and its cross entropy together, without ever holding all logits.

The logits of some thousand tokens at a time are computed, replaced by their gradient, and
multiplied into the gradients of the hidden states and of the weight: three GEMMs, as in the usual
way, but all in the forward pass. The two gradients are kept, and scaled in the backward pass.

Letters: T tokens, N tokens of a block, D model dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.ops.fp8.choice import functions
from torchtitan.ops.fp8.linear import (
    Fp8Recipe,
    fake_columns,
    fake_rows,
    groups_of,
    input_in_fp8,
    linear_forward,
    linear_gradients_,
    no_columns,
)
from torchtitan.ops.fp8.quantize import Fp8
from torchtitan.ops.fp8.weight import Fp8Weight, quantised, transposed

# Large blocks make GEMMs fast and add up the weight's gradient in few roundings; 2^29 logits are
# 1 GiB in bf16.
_MAX_LOGITS = 2**29


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, fp8: Fp8Recipe | None = None
) -> Tensor:
    """Sum over tokens of −log softmax(weight · x)[label]: scalar fp32.

    x_TD, weight_VD: of one dtype; logits are rounded to it, the softmax is fp32 (fp64 stays fp64).
    labels_T: int64; tokens with `IGNORE_INDEX` don't count.
    fp8: how the three products are computed in FP8; None = in the dtype of x.
    """
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, fp8)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, fp8):
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        T, V = x_TD.size(0), weight_VD.size(0)
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        products = _InFp8(weight_VD, fp8, needs_weight) if fp8 else _Plain(weight_VD, needs_weight)
        loss = torch.zeros((), dtype=_loss_dtype(x_TD), device=x_TD.device)
        for start, stop in _blocks(T, V):
            grad_x_ND = None if grad_x_TD is None else grad_x_TD[start:stop]
            loss += products.loss(x_TD[start:stop], labels_T[start:stop], grad_x_ND)
        ctx.grads = grad_x_TD, products.grad_weight_VD
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grads, ctx.grads = ctx.grads, None  # scaled in place, so usable for one backward pass
        if grads is None:
            raise RuntimeError("linear_cross_entropy can be differentiated only once")
        return *(g if g is None else _scale_(g, grad_loss) for g in grads), None, None


class _Plain:
    """The products of one block of tokens after the other, in the dtype of the weight.

    grad_weight_VD: sum over the blocks so far; None = not needed.
    """

    grad_weight_VD: Tensor | None = None

    def __init__(self, weight_VD: Tensor, needs_weight: bool):
        self._weight_VD, self._needs_weight = weight_VD, needs_weight

    def loss(self, x_ND: Tensor, labels_N: Tensor, grad_x_ND: Tensor | None) -> Tensor:
        """Return the sum of a block's losses; add its gradient to that of the weight.

        grad_x_ND: place of the gradient of x; None = not needed.
        """
        grad_NV = x_ND @ self._weight_VD.t()
        with_grad = grad_x_ND is not None or self._needs_weight
        loss = _cross_entropy_(grad_NV, labels_N, with_grad=with_grad)
        if grad_x_ND is not None:
            torch.mm(grad_NV, self._weight_VD, out=grad_x_ND)
        if self._needs_weight and self.grad_weight_VD is None:
            self.grad_weight_VD = grad_NV.t() @ x_ND
        elif self.grad_weight_VD is not None:
            self.grad_weight_VD.addmm_(grad_NV.t(), x_ND)
        return loss


class _InFp8:
    """The same in FP8; the weight is quantised once for all blocks, unless it comes so, and
    transposed once."""

    grad_weight_VD: Tensor | None = None

    def __init__(self, weight_VD: Tensor, recipe: Fp8Recipe, needs_weight: bool):
        if not isinstance(weight_VD, Fp8Weight):
            weight_VD = quantised(weight_VD, weight_VD.dtype, emulate=recipe.emulate)
        self._weight_VD, self._recipe, self._needs_weight = weight_VD, recipe, needs_weight
        self._turned: Fp8 | None = None

    def loss(self, x_ND: Tensor, labels_N: Tensor, grad_x_ND: Tensor | None) -> Tensor:
        recipe, trains = self._recipe, self._needs_weight
        logits_NV, kept = linear_forward(x_ND, self._weight_VD, recipe, trains=trains)
        if grad_x_ND is None and not trains:
            return _cross_entropy_(logits_NV, labels_N, with_grad=False)
        loss, *gradient = _gradient_in_fp8(logits_NV, labels_N, *recipe[:2], trains)
        del logits_NV
        if grad_x_ND is not None and self._turned is None:
            self._turned = transposed(self._weight_VD, emulate=recipe.emulate)
        add = self.grad_weight_VD is not None
        if trains and not add:
            self.grad_weight_VD = x_ND.new_empty(self._weight_VD.shape)
        linear_gradients_(
            Fp8(*gradient[:2]),
            Fp8(*gradient[2:]),
            kept,
            self._turned,
            grad_x_ND,
            self.grad_weight_VD,
            add=add,
            emulate=recipe.emulate,
        )
        return loss


@torch.library.custom_op("torchtitan::fp8_logits_gradient", mutates_args=("logits_NV",))
def _gradient_in_fp8(
    logits_NV: Tensor, labels_N: Tensor, wide_gradients: bool, emulate: bool, by_columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of the losses, and its gradient by rows and by columns; of the logits nothing
    is defined then.

    by_columns: whether these are needed; otherwise they have no elements.
    """
    kind = Fp8Recipe(wide_gradients).gradient_kind
    if by_columns and logits_NV.is_cuda and not emulate:
        from torchtitan.ops.fp8 import cross_entropy_triton

        losses_N, rows, columns = cross_entropy_triton.cross_entropy(
            logits_NV, labels_N, IGNORE_INDEX, kind
        )
        loss = losses_N.sum()
    else:
        loss = _cross_entropy_(logits_NV, labels_N, with_grad=True)
        do, groups = functions(logits_NV, emulate), groups_of(None, logits_NV)
        rows, columns = input_in_fp8(do, logits_NV, groups, by_columns, kind)
    return loss, rows.values, rows.scales, columns.values, columns.scales


@_gradient_in_fp8.register_fake
def _(logits_NV, labels_N, wide_gradients, emulate, by_columns):
    kind = Fp8Recipe(wide_gradients).gradient_kind
    columns = fake_columns(logits_NV, 1, kind) if by_columns else no_columns(logits_NV)
    loss = logits_NV.new_empty((), dtype=_loss_dtype(logits_NV))
    return loss, *fake_rows(logits_NV, kind), *columns


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
