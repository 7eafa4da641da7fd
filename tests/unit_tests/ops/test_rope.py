"""RoPE is a turn of complex numbers; YaRN stretches the pairs that the paper says."""

import math

import pytest
import torch

from tests.reference.mla import frequencies, rotate
from torchtitan.ops.rope import (
    Yarn,
    apply_rope,
    rope_frequencies,
    rope_table,
    yarn_softmax_factor,
)

B, S, H, C = 2, 9, 3, 16
V3 = Yarn(factor=40.0, original_seq_len=4096, beta_fast=32.0, beta_slow=1.0)


def heads(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(B, S, H, C, dtype=dtype)


@pytest.mark.parametrize("yarn", [None, Yarn(factor=8.0, original_seq_len=64)])
def test_rope_turns_neighbouring_channels_as_complex_numbers(yarn):
    x = heads()
    turned = apply_rope(x, rope_table(C, 32, 10000.0, yarn))
    options = yarn and {"factor": 8.0, "original": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    freqs = torch.tensor(frequencies(C, 10000.0, options), dtype=torch.float64)
    angles = torch.outer(torch.arange(S, dtype=torch.float64), freqs)
    for b in range(B):
        for h in range(H):
            expected = rotate(x[b, :, h].double(), angles)
            torch.testing.assert_close(turned[b, :, h].double(), expected, rtol=0, atol=5e-6)


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, C, dtype=torch.float64)
    table = rope_table(C, 64, 10000.0).double()

    def score(query_at: int, key_at: int) -> float:
        turned_q = apply_rope(q, table, torch.tensor([[query_at]]))
        turned_k = apply_rope(k, table, torch.tensor([[key_at]]))
        return (turned_q * turned_k).sum().item()

    for distance in (0, 1, 7):
        scores = [score(start + distance, start) for start in (0, 5, 40)]
        assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)
    assert abs(score(7, 0) - score(0, 0)) > 0.01


def test_positions_choose_the_angles():
    x, table = heads(), rope_table(C, 32, 10000.0)
    counting = torch.arange(S).expand(B, S)
    assert torch.equal(apply_rope(x, table, counting), apply_rope(x, table))
    restarted = torch.cat((torch.arange(4), torch.arange(S - 4))).expand(B, S)
    turned = apply_rope(x, table, restarted)
    assert torch.equal(turned[:, :4], apply_rope(x[:, :4], table))
    assert torch.equal(turned[:, 4:], apply_rope(x[:, 4:], table))


def test_rotation_is_computed_in_fp32_and_returned_in_the_input_dtype():
    table = rope_table(C, 32, 10000.0)
    x = heads(torch.bfloat16)
    turned = apply_rope(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), table).bfloat16())
    assert apply_rope(heads(torch.float64), table).dtype == torch.float64


def test_fp64_is_not_rounded_on_the_way():
    x = heads(torch.float64)
    still = rope_table(C, 32, 10000.0)[:1].expand(S, -1, -1)  # position 0: nothing turns
    assert torch.equal(apply_rope(x, still), x)


def test_rotation_keeps_lengths_and_its_gradient_turns_back():
    x = heads(torch.float64).requires_grad_()
    table = rope_table(C, 32, 10000.0).double()
    turned = apply_rope(x, table)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    turned.backward(turned.detach())
    torch.testing.assert_close(x.grad, x.detach(), rtol=1e-6, atol=1e-6)


def test_plain_frequencies_are_the_powers_of_the_base():
    expected = [10000.0 ** (-2 * i / 64) for i in range(32)]
    torch.testing.assert_close(
        rope_frequencies(64, 10000.0).double(), torch.tensor(expected).double()
    )


def test_yarn_ramp_of_v3_lies_between_pairs_10_and_23():
    plain, freqs = (
        rope_frequencies(64, 10000.0).double(),
        rope_frequencies(64, 10000.0, V3).double(),
    )
    ratio = (freqs / plain).tolist()
    for pair in range(32):
        stretched = min(max((pair - 10) / 13, 0.0), 1.0)
        assert ratio[pair] == pytest.approx(stretched / 40 + 1 - stretched, rel=1e-5)


@pytest.mark.parametrize(
    "dim, theta, yarn",
    [
        (64, 10000.0, V3),
        (64, 50000.0, Yarn(factor=32.0, original_seq_len=4096)),  # Kimi-K2's base and factor
        (32, 10000.0, Yarn(factor=4.0, original_seq_len=512, beta_fast=16.0, beta_slow=2.0)),
        (16, 10000.0, Yarn(factor=40.0, original_seq_len=64)),  # the ramp's start cut at 0
        (16, 10000.0, Yarn(factor=40.0, original_seq_len=400_000)),  # its end beyond the last pair
        (16, 10000.0, Yarn(factor=40.0, original_seq_len=10**8)),  # and beyond dim - 1
    ],
)
def test_yarn_frequencies_are_the_formulas(dim, theta, yarn):
    options = dict(zip(("factor", "original", "beta_fast", "beta_slow"), yarn, strict=True))
    expected = torch.tensor(frequencies(dim, theta, options))
    torch.testing.assert_close(rope_frequencies(dim, theta, yarn), expected, rtol=2e-6, atol=0)


def test_yarn_leaves_fast_pairs_alone_and_stretches_slow_ones_wholly():
    """The paper's rule (arXiv 2309.00071, section 3.2) in its terms: turns in the old context."""
    plain, freqs = rope_frequencies(64, 10000.0), rope_frequencies(64, 10000.0, V3)
    turns = 4096 * plain / (2 * math.pi)
    assert torch.equal(freqs[turns > 32], plain[turns > 32])
    torch.testing.assert_close(freqs[turns < 1], plain[turns < 1] / 40)
    between = (turns < 31) & (turns > 1.1)
    assert ((freqs < plain) & (freqs > plain / 40))[between].all() and between.any()


def test_a_ramp_without_width_does_not_divide_by_zero():
    nothing_turns = Yarn(factor=2.0, original_seq_len=1)
    freqs = rope_frequencies(8, 10000.0, nothing_turns)
    assert torch.isfinite(freqs).all()


@pytest.mark.parametrize("mscale, expected", [(1.0, 1.87385), (0.707, 1.58963), (0.0, 1.0)])
def test_softmax_factor_at_factor_40(mscale, expected):
    assert yarn_softmax_factor(40.0, mscale) == pytest.approx(expected, abs=5e-6)


def test_table_is_fp32_under_a_bf16_default_dtype():
    expected = rope_table(C, 32, 10000.0, V3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = rope_table(C, 32, 10000.0, V3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.dtype == torch.float32 and table.shape == (32, C // 2, 2)
    assert torch.equal(table, expected)
