"""Block-wise FP8 against DeepSeek's formula, written as loops over blocks; ragged ones too."""

import pytest
import torch
from torch import Tensor

from torchtitan.ops.block_fp8 import dequantize_blocks, quantize_blocks

SHAPES = [(128, 128), (256, 384), (200, 300), (1, 129), (130, 7), (576, 64)]


def looped(values: Tensor, scale_inv: Tensor) -> Tensor:
    """weight = value × scale, block by block, in fp32."""
    out = torch.empty(values.shape)
    for i in range(scale_inv.shape[0]):
        for j in range(scale_inv.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            out[block] = values[block].float() * scale_inv[i, j]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_is_the_official_formula_bit_by_bit(shape):
    values = torch.randn(shape).mul(30).to(torch.float8_e4m3fn)
    blocks = [-(-n // 128) for n in shape]
    scale_inv = torch.rand(blocks) * 1e-3
    assert torch.equal(dequantize_blocks(values, scale_inv), looped(values, scale_inv))


def test_a_part_is_dequantised_with_the_scales_of_its_place():
    values = torch.randn(300, 400).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(3, 4)
    part = dequantize_blocks(values[100:260, 120:390], scale_inv, (100, 120))
    assert torch.equal(part, looped(values, scale_inv)[100:260, 120:390])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_stays_within_e4m3s_rounding(shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-3, 0, shape[1])).to(dtype)
    values, scale_inv = quantize_blocks(weight)
    assert values.shape == weight.shape and scale_inv.dtype == torch.float32
    error = (dequantize_blocks(values, scale_inv) - weight.float()).abs()
    # Half a step: 1/16 of the value (3 bits of mantissa), and below 2^-6 half of 2^-9 of the scale.
    step = torch.maximum(weight.float().abs() / 16, looped(torch.ones(shape), scale_inv) * 2**-10)
    assert (error <= step * (1 + 1e-6)).all()


def test_scales_are_largest_magnitude_by_448_in_fp32_bit_by_bit():
    weight = torch.randn(300, 260)
    _, scale_inv = quantize_blocks(weight)
    for i in range(3):
        for j in range(3):
            block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            largest = max(abs(x) for row in block.tolist() for x in row)  # exact: fp32 in fp64
            expected = torch.tensor(largest, dtype=torch.float32) / torch.tensor(448.0)
            assert scale_inv[i, j] == expected
    # The largest magnitude of a block is the largest number of the format.
    values, _ = quantize_blocks(weight)
    assert values.float().abs().max() == 448


def test_zeros_tiny_and_huge_weights_survive():
    weight = torch.zeros(128, 384)
    weight[:, 128:256] = 1e-30
    weight[:, 256:] = 3e38
    values, scale_inv = quantize_blocks(weight)
    assert scale_inv[0, 0] == 1
    torch.testing.assert_close(dequantize_blocks(values, scale_inv), weight, rtol=1e-6, atol=0)
