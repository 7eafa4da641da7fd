"""Attention of a few runs of queries is the rows that dense causal attention has for them."""

import pytest
import torch

from torchtitan.ops.attention import _borders
from torchtitan.ops.causal_runs import causal_runs

# Of two ranks of two; a single run from the first position; three runs that touch.
RUNS = [(0, 6, 18, 24), (6, 12, 12, 18), (0, 24), (3, 4, 4, 9, 20, 24)]


@pytest.mark.parametrize("borders", RUNS, ids=str)
def test_runs_are_rows_of_dense_attention_and_so_are_their_gradients(borders):
    torch.manual_seed(0)
    pairs = list(zip(borders[::2], borders[1::2], strict=True))
    positions = torch.cat([torch.arange(*pair) for pair in pairs])
    K = borders[-1]
    q = torch.randn(2, len(positions), 3, 10, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, K, 3, 10, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, K, 3, 6, dtype=torch.float64, requires_grad=True)
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * 0.3
    scores = scores.masked_fill(positions[:, None] < torch.arange(K), -torch.inf)
    expected = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v)
    compiled = torch.compile(causal_runs, backend="aot_eager", fullgraph=True)
    grad = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, (q, k, v), grad)
    for function in (causal_runs, compiled):
        out = function(q, k, v, borders, 0.3)
        ours = torch.autograd.grad(out, (q, k, v), grad)
        for a, b in zip((out, *ours), (expected, *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # sums are kept in fp32


def test_borders_are_where_positions_jump():
    assert _borders(torch.tensor([0, 1, 2, 9, 10, 30])) == (0, 3, 9, 11, 30, 31)
    assert _borders(torch.tensor([5])) == (5, 6)
