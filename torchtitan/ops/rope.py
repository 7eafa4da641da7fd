"""Rotary position embedding in DeepSeek's interleaved layout, and its extension by YaRN.

Channels (2i, 2i+1) form a pair that is rotated by `position * frequency[i]`. Cosines and sines are
kept as real numbers: complex tensors neither compile nor run in bf16. On a CPU without a compiler
they serve as views.

RoPE: arXiv 2104.09864. YaRN: arXiv 2309.00071; constants and rounding as in the inference code that
DeepSeek published with V3, so that V3's weights give the published logits.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Yarn(NamedTuple):
    """Arguments of YaRN.

    factor: new context length over the old one.
    original_seq_len: positions that the model was trained on.
    beta_fast: a pair with more rotations than this within the old context keeps its frequency.
    beta_slow: a pair with fewer rotations has its frequency divided by the whole factor; in between
        the change is linear.
    """

    factor: float
    original_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's temperature of attention, as a factor of queries and of keys:
    0.1 · mscale · ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0


def yarn_softmax_factor(factor: float, mscale: float) -> float:
    """YaRN's factor of the softmax scale: (0.1 · mscale · ln(factor) + 1)²."""
    return yarn_magnitude(factor, mscale) ** 2


def rope_frequencies(
    dim: int, theta: float, yarn: Yarn | None = None, *, truncate: bool = True
) -> Tensor:
    """Radians per position for each of the `dim / 2` channel pairs: (dim / 2,) fp32.

    truncate: YaRN's ramp begins and ends at whole pairs (DeepSeek's code), not between them.
    """
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if yarn is None:
        return freqs

    def pair_with_rotations(rotations: float) -> float:
        # The (fractional) pair that makes `rotations` rotations within the original context.
        wavelength = yarn.original_seq_len / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_with_rotations(yarn.beta_fast), pair_with_rotations(yarn.beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, dim - 1)
    # Equal ends would divide by zero. A negative width is kept: the published code keeps it, too.
    width = high - low or 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return freqs / yarn.factor * stretched + freqs * (1 - stretched)


def rope_table(
    dim: int,
    max_seq_len: int,
    theta: float,
    yarn: Yarn | None = None,
    *,
    truncate: bool = True,
    factor: float = 1.0,
) -> Tensor:
    """Cosine and sine of every position's angles, times `factor`: (max_seq_len, dim / 2, 2) fp32.

    truncate: see `rope_frequencies`.
    """
    frequencies = rope_frequencies(dim, theta, yarn, truncate=truncate)
    angles = torch.outer(torch.arange(max_seq_len).float(), frequencies)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return table if factor == 1.0 else table * factor


def apply_rope(x_BSHC: Tensor, table: Tensor, positions_BS: Tensor | None = None) -> Tensor:
    """Rotate neighbouring channel pairs by position, in fp32 (fp64 stays fp64).

    x_BSHC: (batch, sequence, heads, channels); its dtype is that of the result.
    table: from `rope_table`, at least as long as the sequence.
    positions_BS: int; None = 0, 1, ….
    """
    if positions_BS is None:
        table_BSHC2 = table[None, : x_BSHC.size(1), None]
    else:
        table_BSHC2 = table[positions_BS].unsqueeze(2)
    if x_BSHC.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Turn.apply(x_BSHC, table_BSHC2)
    cos, sin = table_BSHC2.unbind(-1)
    dtype = torch.promote_types(x_BSHC.dtype, torch.float32)
    even, odd = x_BSHC.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BSHC.dtype)


class _Turn(torch.autograd.Function):
    """Rotation as one complex product, for eager CPUs: a third of the time of the real form, whose
    operations read or write every second number."""

    @staticmethod
    def forward(ctx: Any, x_BSHC: Tensor, table_BSHC2: Tensor) -> Tensor:
        ctx.save_for_backward(table_BSHC2)
        return _turned(x_BSHC, table_BSHC2)

    @staticmethod
    def backward(ctx: Any, grad_BSHC: Tensor) -> tuple[Tensor, None]:
        (table_BSHC2,) = ctx.saved_tensors
        return _turned(grad_BSHC, table_BSHC2 * table_BSHC2.new_tensor((1.0, -1.0))), None


def _turned(x_BSHC: Tensor, table_BSHC2: Tensor) -> Tensor:
    dtype = torch.promote_types(x_BSHC.dtype, torch.float32)
    # Contiguous: a view as complex numbers must not begin at an odd place.
    pairs = torch.view_as_complex(x_BSHC.to(dtype).contiguous().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * torch.view_as_complex(table_BSHC2))
    return turned.flatten(-2).to(x_BSHC.dtype)
