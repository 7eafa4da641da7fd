"""Quantisation to FP8 in DeepSeek-V3's recipe, in plain torch: the definition, to the bit.

A tensor becomes FP8 values and fp32 scales; value × scale is the number.

    by rows    1 × 128: a scale for every 128 neighbouring elements of a row, a power of two
    by columns the same of the transposed matrix, for products that reduce over rows
    by blocks  128 × 128, largest / 448, as in DeepSeek's published weights: weights

Activations and gradients have powers of two, so that a tensor kept by rows becomes one by columns
without a second rounding, but for numbers too small for it. DeepSeek-V3 does so for what it needs
both ways, V3.1 for everything. Ends of rows that are no multiple of 128 make shorter blocks.

Zeros have scale 1. NaN and infinity make their block NaN, so that a broken run is seen.

Letters: R rows sorted by group, K columns, T tokens, E groups (experts), F hidden dim, P rows with
each group padded to a multiple of 128.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops.swiglu import swiglu as plain_swiglu

BLOCK = 128
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Fp8(NamedTuple):
    """A matrix in FP8.

    values: e4m3 or e5m2; by rows (R, K), by columns (K, P), by blocks (E, N, K).
    scales: fp32; by rows (⌈K/128⌉, R), by columns (P/128, K rounded up to 128), by blocks
        (E, ⌈N/128⌉, ⌈K/128⌉).
    """

    values: Tensor
    scales: Tensor


def power_of_two_scale(largest: Tensor, kind: torch.dtype) -> Tensor:
    """Round largest / (largest number of `kind`) up to a power of two, at least 2^−126; 1 where
    largest is 0, NaN where it isn't finite."""
    # Both largest numbers are 1.75 · 2^n. frexp's mantissas lie in [0.5, 1).
    mantissa, exponent = torch.frexp(largest)
    power = exponent - 1 - (15 if kind == E5M2 else 8) + (mantissa > 0.875)
    scale = torch.ldexp(torch.ones_like(largest), power.clamp(min=-126))
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return torch.where(largest == 0, 1.0, scale)


def _divide(x: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    limit = torch.finfo(kind).max
    return (x / scale).clamp(-limit, limit).to(kind)


def by_rows(x_RK: Tensor, kind: torch.dtype = E4M3) -> Fp8:
    R, K = x_RK.shape
    tiles = F.pad(x_RK.float(), (0, -K % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = power_of_two_scale(tiles.abs().amax(2), kind)
    values = _divide(tiles, scales.unsqueeze(2), kind).flatten(1)[:, :K]
    return Fp8(values.contiguous(), scales.t().contiguous())


def by_columns(x_RK: Tensor, counts: list[int], kind: torch.dtype = E4M3) -> Fp8:
    """Quantise the transposed, each group padded by zeros to a multiple of 128 rows.

    counts: rows of each group; their sum may be less than R.
    """
    rows = x_RK.float()[: sum(counts)].split(counts)
    padded = torch.cat([F.pad(each, (0, 0, 0, -len(each) % BLOCK)) for each in rows])
    tiles = padded.unflatten(0, (-1, BLOCK))
    scales = power_of_two_scale(tiles.abs().amax(1), kind)
    values = _divide(tiles, scales.unsqueeze(1), kind).flatten(0, 1).t()
    return Fp8(values.contiguous(), F.pad(scales, (0, -scales.size(1) % BLOCK)))


def padded_tiles(rows: int, groups: int) -> int:
    """Most tiles of 128 that `rows` rows of `groups` groups, each padded, can fill."""
    return (rows + (BLOCK - 1) * groups) // BLOCK


def by_blocks(w_ENK: Tensor) -> Fp8:
    """Equal, expert by expert, to `block_fp8.quantize_blocks`."""
    E, N, K = w_ENK.shape
    padded = F.pad(w_ENK.float(), (0, -K % BLOCK, 0, -N % BLOCK))
    blocks = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(2, 4))
    # By a tensor: on a GPU torch multiplies by the reciprocal of a Python number.
    scales = largest / torch.full_like(largest, torch.finfo(E4M3).max)
    scales = torch.where(largest == 0, 1.0, scales)
    values = _divide(blocks, scales[:, :, None, :, None], E4M3)
    return Fp8(values.flatten(3, 4).flatten(1, 2)[:, :N, :K].contiguous(), scales)


def transposed_blocks(weight: Fp8) -> Fp8:
    """The same values and scales of the transposed weights, (E, K, N)."""
    values, scales = (t.transpose(1, 2).contiguous() for t in weight)
    return Fp8(values, scales)


def rows_to_float(x: Fp8) -> Tensor:
    """fp32 (R, K), exact: scales are powers of two."""
    K = x.values.size(1)
    return x.values.float() * x.scales.t().repeat_interleave(BLOCK, 1)[:, :K]


def columns_to_float(x: Fp8) -> Tensor:
    """fp32 (P, K), exact."""
    K = x.values.size(0)
    return x.values.float().t() * x.scales.repeat_interleave(BLOCK, 0)[:, :K]


def blocks_to_float(w: Fp8) -> Tensor:
    """fp32 (E, N, K)."""
    _, N, K = w.values.shape
    spread = w.scales.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return w.values.float() * spread[:, :N, :K]


def swiglu(gate_up_R2F: Tensor, weights_R: Tensor | None) -> tuple[Fp8, Fp8]:
    """Return the weighted activation (R, F) and gate and up (R, 2F), by rows. The activation is
    rounded to their dtype first.

    weights_R: fp32 factors of the rows; None = 1.
    """
    gate, up = gate_up_R2F.float().chunk(2, 1)
    weights = 1.0 if weights_R is None else weights_R.unsqueeze(1)
    hidden = by_rows((plain_swiglu(gate, up) * weights).to(gate_up_R2F.dtype))
    halves = by_rows(gate), by_rows(up)
    kept = Fp8(torch.cat([h.values for h in halves], 1), torch.cat([h.scales for h in halves]))
    return hidden, kept


def swiglu_backward(
    grad_RF: Tensor, kept: Fp8, weights_R: Tensor | None, counts: list[int], kind: torch.dtype
) -> tuple[Fp8, Fp8, Fp8, Tensor]:
    """Return the gradient of gate and up by rows (R, 2F) and by columns (2F, P), the weighted
    activation by columns (F, P), and the weights' gradient (R,) fp32, without weights (0,). All but
    the last are rounded to the dtype of `grad_RF` first.

    kept: gate and up from `swiglu`, of which the activation is computed again.
    """
    gate, up = rows_to_float(kept).chunk(2, 1)
    grad = grad_RF.float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    hidden = silu * up
    weights, grad_weights_R = 1.0, grad.new_empty(0)
    if weights_R is not None:
        weights, grad_weights_R = weights_R.unsqueeze(1), (grad * hidden).sum(1)
    grad = grad * weights
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    both = torch.cat((grad_gate, grad * silu), 1).to(grad_RF.dtype)
    of_hidden = by_columns((hidden * weights).to(grad_RF.dtype), counts)
    return by_rows(both, kind), by_columns(both, counts, kind), of_hidden, grad_weights_R
