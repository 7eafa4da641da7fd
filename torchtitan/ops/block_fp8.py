"""FP8 weights with one scale per 128 × 128 block, the format in which DeepSeek-V3 was published.

A weight (rows, columns) becomes e4m3 values of the same shape and `scale_inv`, fp32 (⌈rows/128⌉,
⌈columns/128⌉); blocks at the lower and right edge may be ragged. weight = value × scale_inv.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of `scale_inv` for a weight of this shape."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a finite 2-D weight: e4m3 values (rows, columns) and fp32 `scale_inv`.

    A block's scale_inv is its largest magnitude / 448 (1 for a block of zeros); a value is
    weight / scale_inv rounded to the nearest e4m3 number. All in fp32 and without any sum, so its
    bits are the same on any machine.
    """
    rows, columns = weight.shape
    weight = weight.float()
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    largest = blocks.abs().amax(dim=(1, 3))
    # By a tensor: on a GPU torch multiplies by the reciprocal of a Python number.
    scale_inv = largest / torch.full_like(largest, FP8_MAX)
    scale_inv = torch.where(scale_inv > 0, scale_inv, 1.0)
    return (weight / _spread(scale_inv, (0, 0), weight.shape)).to(FP8), scale_inv


def dequantize_blocks(
    values: Tensor, scale_inv: Tensor, offset: tuple[int, int] = (0, 0)
) -> Tensor:
    """Compute value × scale_inv in fp32, for a whole weight or a part of it.

    values: e4m3, (rows, columns) of the part.
    scale_inv: of the whole weight.
    offset: row and column at which the part begins.
    """
    return values.float() * _spread(scale_inv.float(), offset, values.shape)


def _spread(scale_inv: Tensor, offset: tuple[int, int], shape: torch.Size) -> Tensor:
    """Expand the scales to one for every element of a part: (rows, columns)."""
    rows, columns = (
        torch.arange(start, start + size, device=scale_inv.device) // BLOCK
        for start, size in zip(offset, shape, strict=True)
    )
    return scale_inv[rows[:, None], columns]
