"""The products of experts by torch's grouped kernel, with gathers and SwiGLU of our own beside it.

Letters: R rows sorted by group, E groups; `ends_E` int32, rows up to the end of each group, on the
device. Results are undefined behind the last group's rows.
"""

from typing import NamedTuple

from torch import Tensor

from torchtitan.ops.grouped_mm import kernel


class Gathered(NamedTuple):
    """Rows of a smaller matrix: row r is x[slot_of_row[r] // top_k].

    slot_of_row_R: int32.
    num_rows: one int32 on the device, rows that there are; None = all R.
    """

    x: Tensor
    slot_of_row_R: Tensor
    top_k: int
    num_rows: Tensor | None


def gather(rows: Gathered) -> Tensor:
    """Return rows for more than one of the products below."""
    from torchtitan.ops import permute_triton

    if rows.num_rows is None:
        return rows.x.index_select(0, rows.slot_of_row_R // rows.top_k)
    return permute_triton.expand_rows(rows.x, rows.slot_of_row_R, rows.num_rows, rows.top_k)


def gate_up_swiglu(
    rows: Gathered, w13_E2FD: Tensor, weights_TK: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return gate and up, w13[e] · row, (R, 2F), and silu(gate) · up · weight, (R, F).

    weights_TK: fp32, of each slot.
    """
    from torchtitan.ops import swiglu_triton

    gate_up_R2F = kernel(gather(rows), w13_E2FD.transpose(1, 2), offs=ends_E)
    slots, num_rows = rows.slot_of_row_R, rows.num_rows
    return gate_up_R2F, swiglu_triton.forward(gate_up_R2F, weights_TK, slots, num_rows)


def by_weights(rows_RK: Tensor, w_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """Compute w[e] · row for the rows of each group e: (R, N)."""
    return kernel(rows_RK, w_ENK.transpose(1, 2), offs=ends_E)


def by_weights_transposed(rows_RK: Tensor, w_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """Compute w[e]ᵀ · row for the rows of each group e: (R, N)."""
    return kernel(rows_RK, w_EKN, offs=ends_E)


def swiglu_backward(
    grads_RD: Tensor,
    w2_EDF: Tensor,
    gate_up_R2F: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    num_rows: Tensor | None,
    ends_E: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of gate and up (R, 2F), silu(gate) · up · weight again (R, F), and the
    gradient of the weights (T, K), 0 for slots without a row.

    grads_RD: of the outputs w2[e] · hidden, from `gather`.
    num_rows: as of `Gathered`.
    """
    from torchtitan.ops import swiglu_triton

    grad_RF = by_weights_transposed(grads_RD, w2_EDF, ends_E)
    return swiglu_triton.backward(grad_RF, gate_up_R2F, weights_TK, slot_of_row_R, num_rows)


def over_rows(a: Tensor | Gathered, b: Tensor | Gathered, ends_E: Tensor) -> Tensor:
    """Compute aᵀ · b over the rows of each group, (E, M, N); at most one of them is gathered."""
    a, b = (gather(each) if isinstance(each, Gathered) else each for each in (a, b))
    return kernel(a.t(), b, offs=ends_E)
