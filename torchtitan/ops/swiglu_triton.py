"""SwiGLU over routed rows as one Triton kernel forward and one backward; reference: ops/swiglu.py.

Forward reads gate and up once and writes the activation. Backward recomputes the activation from
gate and up, so that the layer need not keep it. Arithmetic in fp32, results rounded once.
"""

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    gate_up,
    weights,
    slots,
    num_rows,
    out,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COUNTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:
        if row >= tl.load(num_rows):
            return
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < F
    gate = tl.load(gate_up + row * 2 * F + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + cols, mask=inside, other=0.0).to(tl.float32)
    hidden = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        hidden *= tl.load(weights + tl.load(slots + row))
    tl.store(out + row * F + cols, hidden.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_hidden,
    gate_up,
    weights,
    slots,
    num_rows,
    grad_gate_up,
    hidden_out,
    grad_weights,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COUNTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:
        if row >= tl.load(num_rows):
            return
    weight = 1.0
    if WEIGHTED:
        slot = tl.load(slots + row)
        weight = tl.load(weights + slot)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, F, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < F
        gate = tl.load(gate_up + row * 2 * F + cols, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * F + F + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_hidden + row * F + cols, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        total += grad * hidden
        grad *= weight
        grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
        kind = grad_gate_up.dtype.element_ty
        tl.store(grad_gate_up + row * 2 * F + cols, grad_gate.to(kind), mask=inside)
        tl.store(grad_gate_up + row * 2 * F + F + cols, (grad * silu).to(kind), mask=inside)
        tl.store(hidden_out + row * F + cols, (hidden * weight).to(kind), mask=inside)
    if WEIGHTED:
        tl.store(grad_weights + slot, tl.sum(total))


def _block(F: int) -> int:
    """Block size: a power of two, chosen so that little of the last block is wasted."""
    return min(1024, triton.next_power_of_2(F)) if F % 512 == 0 or F < 512 else 512


def forward(
    gate_up_R2F: Tensor,
    weights_N: Tensor | None,
    slot_of_row_R: Tensor | None,
    num_rows: Tensor | None = None,
) -> Tensor:
    """Compute the activation (R, F).

    gate_up_R2F: gate, then up.
    weights_N: fp32 weight of each slot; None = no weights.
    slot_of_row_R: slot of each row; None only without weights.
    num_rows: one int32 on the device, number of rows to compute; None = all R.
    """
    R, F = gate_up_R2F.size(0), gate_up_R2F.size(1) // 2
    out_RF = gate_up_R2F.new_empty(R, F)
    if R:
        block = _block(F)
        _forward[(R, triton.cdiv(F, block))](
            gate_up_R2F,
            weights_N,
            slot_of_row_R,
            num_rows,
            out_RF,
            F=F,
            BLOCK=block,
            WEIGHTED=weights_N is not None,
            COUNTED=num_rows is not None,
        )
    return out_RF


@overload
def backward(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_N: Tensor,
    slot_of_row_R: Tensor | None,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def backward(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_N: None,
    slot_of_row_R: Tensor | None,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]: ...


def backward(
    grad_RF: Tensor,
    gate_up_R2F: Tensor,
    weights_N: Tensor | None,
    slot_of_row_R: Tensor | None,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradient of gate and up (R, 2F), the activation (R, F; weighted, as `forward`
    returned it), and the gradient of the weights, by slot (N,), 0 for slots without a row.

    num_rows: one int32 on the device, number of rows to compute; None = all R.
    """
    R, F = grad_RF.shape
    grad_gate_up_R2F, hidden_RF = torch.empty_like(gate_up_R2F), torch.empty_like(grad_RF)
    new = torch.empty_like if num_rows is None else torch.zeros_like
    grad_weights_N = None if weights_N is None else new(weights_N)
    if R:
        _backward[(R,)](
            grad_RF,
            gate_up_R2F,
            weights_N,
            slot_of_row_R,
            num_rows,
            grad_gate_up_R2F,
            hidden_RF,
            grad_weights_N,
            F=F,
            BLOCK=_block(F),
            WEIGHTED=weights_N is not None,
            COUNTED=num_rows is not None,
        )
    return grad_gate_up_R2F, hidden_RF, grad_weights_N
