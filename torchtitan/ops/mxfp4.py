"""MXFP4 weights (OCP Microscaling Formats 1.0): e2m1 values, one e8m0 scale for 32 of a row.

A weight (rows, columns) is stored as bytes (rows, columns / 2), the even column in the lower four
bits, and as scales (rows, columns / 32), bytes that stand for 2^(byte − 127). weight =
value × scale, which bf16 and fp32 hold exactly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

GROUP = 32
# By the four bits: sign, two of the exponent, one of the mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])


def dequantize_mxfp4(packed: Tensor, scales: Tensor) -> Tensor:
    """Compute value × scale in fp32: (rows, columns).

    packed: 8-bit integers, (rows, columns / 2).
    scales: 8-bit, (rows, columns / 32); NaN where a byte is 255.
    """
    packed = packed.view(torch.uint8)
    indices = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    factors = scales.view(torch.float8_e8m0fnu).float()
    return (_VALUES[indices.int()].unflatten(1, (-1, GROUP)) * factors.unsqueeze(-1)).flatten(1)


def is_mxfp4(quantization: Mapping[str, Any]) -> bool:
    """Tell whether a `quantization_config` means MXFP4, of transformers or compressed-tensors."""
    method = quantization.get("quant_method")
    packed = quantization.get("format") == "mxfp4-pack-quantized"
    return method == "mxfp4" or (method == "compressed-tensors" and packed)
