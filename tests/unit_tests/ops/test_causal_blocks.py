"""Causal attention by blocks is torch's, whatever the blocks and the layout of its inputs."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import causal_blocks as module
from torchtitan.ops.causal_blocks import can_use_blocks, causal_blocks


def inputs(S: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys, and values that are the last channels of a wider tensor, as in MLA."""
    torch.manual_seed(0)
    q, k, kv = (torch.randn(2, S, 3, c, dtype=dtype, requires_grad=True) for c in (24, 24, 40))
    return q, k, kv[..., 24:]


@pytest.mark.parametrize("S", [1, 4, 7, 12, 130])
@pytest.mark.parametrize("queries, max_scores", [(4, 100), (4, 2**22), (128, 2**22)])
def test_blocks_are_the_whole(S, queries, max_scores, monkeypatch):
    monkeypatch.setattr(module, "_QUERIES", queries)
    monkeypatch.setattr(module, "_MAX_SCORES", max_scores)
    ours = inputs(S)
    exact = [t.detach().double().requires_grad_() for t in ours]
    out = causal_blocks(*ours, 0.3)
    expected = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in exact), is_causal=True, scale=0.3
    ).transpose(1, 2)
    weights = torch.randn_like(out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out, ours, weights)
    for grad, its in zip(
        grads, torch.autograd.grad(expected, exact, weights.double()), strict=True
    ):
        torch.testing.assert_close(grad.double(), its, rtol=1e-5, atol=1e-5)


def test_the_operator_fits_its_registration():
    torch.library.opcheck(torch.ops.torchtitan.causal_blocks.default, (*inputs(130), 0.3))


def test_only_fp32_of_whole_sequences():
    q, k, _ = inputs(4)
    assert can_use_blocks(q, k)
    assert not can_use_blocks(q[:, 1:], k)
    assert not can_use_blocks(q.bfloat16(), k.bfloat16())
