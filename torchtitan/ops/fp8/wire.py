"""Rows that travel in FP8: values and scales as one message of half the bytes of bf16.

What arrives has the numbers that were quantised, and a product in FP8 quantises them again to
exactly these: results are those of rows that travelled whole.
"""

import torch
from torch import Tensor

from torchtitan.ops.fp8 import quantize
from torchtitan.ops.fp8.choice import functions
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, E5M2, Fp8


def packed_bytes(channels: int) -> int:
    """Bytes of a row's message."""
    return channels + 4 * -(-channels // BLOCK)


def pack(x_RD: Tensor, kind: torch.dtype, *, emulate: bool) -> Tensor:
    """Quantise rows by rows: (R, W) fp32, whose bits are the values, then the scales.

    kind: e4m3 or e5m2.
    """
    return _pack(x_RD.contiguous(), kind == E5M2, emulate)


def unpack(packed_RW: Tensor, channels: int, kind: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Return the numbers that `pack` quantised, (R, channels); exact in bf16 and fp32."""
    return _unpack(packed_RW, channels, kind == E5M2, dtype)


@torch.library.custom_op("torchtitan::fp8_pack", mutates_args=())
def _pack(x_RD: Tensor, wide: bool, emulate: bool) -> Tensor:
    x = functions(x_RD, emulate).by_rows(x_RD, E5M2 if wide else E4M3)
    scales = x.scales.t().contiguous().view(torch.uint8)
    return torch.cat((x.values.view(torch.uint8), scales), dim=1).view(torch.float32)


@_pack.register_fake
def _(x_RD, wide, emulate):
    R, D = x_RD.shape
    return x_RD.new_empty(R, packed_bytes(D) // 4, dtype=torch.float32)


@torch.library.custom_op("torchtitan::fp8_unpack", mutates_args=())
def _unpack(packed_RW: Tensor, channels: int, wide: bool, dtype: torch.dtype) -> Tensor:
    kind = E5M2 if wide else E4M3
    values, scales = packed_RW.view(torch.uint8).split(
        [channels, packed_bytes(channels) - channels], dim=1
    )
    scales = scales.contiguous().view(torch.float32).t()
    return quantize.rows_to_float(Fp8(values.contiguous().view(kind), scales)).to(dtype)


@_unpack.register_fake
def _(packed_RW, channels, wide, dtype):
    return packed_RW.new_empty(packed_RW.size(0), channels, dtype=dtype)
