"""All of an MoE layer between routing and its output, for experts that live on this device.

Gather each expert's rows, one grouped GEMM for gate and up, SwiGLU with the routing weight, one
grouped GEMM down, sum each token's rows. On a GPU this is one operator, which keeps for its
backward pass the tokens, gate and up, and the order of the rows, and recomputes the rest (the
gathered rows and the activation, no GEMM). Elsewhere, and as the reference in tests, the same is
computed operation by operation; experts with low-rank adapters always are.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan.ops import grouped_mm_torch
from torchtitan.ops.grouped_mm import grouped_linear, why_loop
from torchtitan.ops.grouped_mm_torch import Gathered
from torchtitan.ops.lora import LowRank, add_grouped_low_rank
from torchtitan.ops.permute import RowOrder, counts_of, expand_rows, reduce_rows
from torchtitan.ops.swiglu import swiglu

Adapters = Sequence[LowRank | None]
_thread = threading.local()


def expert_ffn(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    order: RowOrder,
    adapters: Adapters = (None, None, None),
) -> Tensor:
    """Sum weight · w2(silu(w1 x) · w3 x) over the K experts of every token: (T, D).

    w13_E2FD: w1 (gate) above w3 (up).
    weights_TK: fp32, routing weights.
    order: from `sort_slots` on the experts' ids; −1 = an expert of another rank. Its list may be
        longer than the number of copies, which stays on the device.
    adapters: of w1, w3 and w2; None = it has none.
    """
    if _has_kernels(x_TD, w2_EDF) and not any(adapters):
        return _expert_ffn(x_TD, w13_E2FD, w2_EDF, weights_TK, *order)[0]
    return expert_ffn_chain(x_TD, w13_E2FD, w2_EDF, weights_TK, order, adapters)


def _has_kernels(x_TD: Tensor, w2_EDF: Tensor) -> bool:
    sizes = (x_TD.size(1), w2_EDF.size(2))
    return x_TD.is_cuda and x_TD.size(0) > 0 and why_loop(x_TD.dtype, sizes, on_cpu=False) is None


class ExpertOperator(NamedTuple):
    """The experts' forward and backward pass, for an autograd function of the caller's.

    forward: (x, w13, w2, weights, *order, *settings) to (output, *kept).
    backward: (grad, x, *kept, w13, w2, weights, *order, *settings, trains_w13, trains_w2) to the
        gradients of x, w13, w2 and weights; that of a frozen weight is empty.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    settings: tuple[bool, ...] = ()


def expert_operator(x_TD: Tensor, w2_EDF: Tensor) -> ExpertOperator | None:
    """Return the operator that computes `expert_ffn` without adapters; None where there is none."""
    return ExpertOperator(_expert_ffn, _expert_ffn_backward) if _has_kernels(x_TD, w2_EDF) else None


@contextmanager
def tokens_first(then: Callable[[Tensor], None]) -> Iterator[None]:
    """Let backward passes of experts call `then` with the gradient of their tokens, as soon as it
    is there: the weights' gradients are computed afterwards."""
    before = getattr(_thread, "then", None)
    _thread.then = then
    try:
        yield
    finally:
        _thread.then = before


def tokens_are_ready(grad_TD: Tensor) -> None:
    """Call what `tokens_first` was told."""
    then = getattr(_thread, "then", None)
    if then is not None:
        then(grad_TD)


def expert_ffn_chain(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    order: RowOrder,
    adapters: Adapters = (None, None, None),
    *,
    product: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_linear,
) -> Tensor:
    """Compute `expert_ffn` operation by operation. With empty slots this has a host sync.

    product: of rows with the experts' weights; adapters have their own.
    """
    if order.some_empty:  # leave out the rows behind the last copy
        slot_of_row_R = order.slot_of_row_R[: int(order.ends[-1])]
        # Not by `_replace`: torch 2.11 can't compile what comes after it.
        order = RowOrder(slot_of_row_R, *order[1:])
    weights_R, counts_E = weights_TK.flatten()[order.slot_of_row_R], counts_of(order)
    rows_RD = expand_rows(x_TD, order)
    gate_up_R2F = product(rows_RD, w13_E2FD, counts_E)
    of_gate, of_up, of_down = adapters
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=1)
    gate_RF = add_grouped_low_rank(gate_RF, rows_RD, of_gate, counts_E)
    up_RF = add_grouped_low_rank(up_RF, rows_RD, of_up, counts_E)
    hidden_RF = swiglu(gate_RF, up_RF, weights_R)
    out_RD = product(hidden_RF, w2_EDF, counts_E)
    return reduce_rows(add_grouped_low_rank(out_RD, hidden_RF, of_down, counts_E), order)


@torch.library.custom_op("torchtitan::expert_ffn", mutates_args=())
def _expert_ffn(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    row_of_slot_TK: Tensor,
    ends_E: Tensor,
    some_empty: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, D), and gate and up (R, 2F), which the backward pass needs."""
    from torchtitan.ops import permute_triton

    products = _products(x_TD, w2_EDF)
    rows = Gathered(x_TD, slot_of_row_R, weights_TK.size(1), ends_E[-1:] if some_empty else None)
    gate_up_R2F, hidden_RF = products.gate_up_swiglu(rows, w13_E2FD, weights_TK, ends_E)
    rows_RD = products.by_weights(hidden_RF, w2_EDF, ends_E)
    return permute_triton.reduce_rows(rows_RD, row_of_slot_TK), gate_up_R2F


@_expert_ffn.register_fake
def _(x_TD, w13_E2FD, w2_EDF, weights_TK, slot_of_row_R, row_of_slot_TK, ends_E, some_empty):
    return torch.empty_like(x_TD), x_TD.new_empty(slot_of_row_R.size(0), w13_E2FD.size(1))


@torch.library.custom_op("torchtitan::expert_ffn_backward", mutates_args=())
def _expert_ffn_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gate_up_R2F: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    row_of_slot_TK: Tensor,
    ends_E: Tensor,
    some_empty: bool,
    trains_w13: bool,
    trains_w2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the tokens, w13, w2 and the routing weights; that of a frozen weight
    is empty."""
    from torchtitan.ops import permute_triton

    products = _products(x_TD, w2_EDF)
    num_rows, top_k = ends_E[-1:] if some_empty else None, weights_TK.size(1)
    grads = products.gather(Gathered(grad_TD, slot_of_row_R, top_k, num_rows))
    grad_gate_up_R2F, hidden_RF, grad_weights_TK = products.swiglu_backward(
        grads, w2_EDF, gate_up_R2F, weights_TK, slot_of_row_R, num_rows, ends_E
    )
    out_RD = products.by_weights_transposed(grad_gate_up_R2F, w13_E2FD, ends_E)
    grad_x_TD = permute_triton.reduce_rows(out_RD, row_of_slot_TK)
    del out_RD
    tokens_are_ready(grad_x_TD)
    grad_w13_E2FD, grad_w2_EDF = w13_E2FD.new_empty(0), w2_EDF.new_empty(0)
    if trains_w2:
        grad_w2_EDF = products.over_rows(grads, hidden_RF, ends_E)
    del grads, hidden_RF
    if trains_w13:
        rows = Gathered(x_TD, slot_of_row_R, top_k, num_rows)
        grad_w13_E2FD = products.over_rows(grad_gate_up_R2F, rows, ends_E)
    return grad_x_TD, grad_w13_E2FD, grad_w2_EDF, grad_weights_TK


@_expert_ffn_backward.register_fake
def _(grad, x_TD, gate_up, w13, w2, weights_TK, slot, row, ends, some_empty, trains_w13, trains_w2):
    grad_w13 = torch.empty_like(w13) if trains_w13 else w13.new_empty(0)
    grad_w2 = torch.empty_like(w2) if trains_w2 else w2.new_empty(0)
    return torch.empty_like(x_TD), grad_w13, grad_w2, torch.empty_like(weights_TK)


def _products(x_TD: Tensor, w2_EDF: Tensor) -> ModuleType:
    """Return the functions that compute these experts' products on this GPU."""
    from torchtitan.ops import grouped_mm_cuda

    return grouped_mm_cuda if grouped_mm_cuda.applies(x_TD, w2_EDF) else grouped_mm_torch


def _save(ctx, inputs, output) -> None:
    x_TD, *others, some_empty = inputs
    ctx.set_materialize_grads(False)
    ctx.some_empty = some_empty
    ctx.save_for_backward(x_TD, output[1], *others)


def _backward(ctx, grad_TD, _):
    trains = ctx.needs_input_grad[1:3]
    grads = list(
        _expert_ffn_backward(grad_TD.contiguous(), *ctx.saved_tensors, ctx.some_empty, *trains)
    )
    for i, trained in enumerate(trains, start=1):
        grads[i] = grads[i] if trained else None
    return *grads, None, None, None, None


_expert_ffn.register_autograd(_backward, setup_context=_save)
