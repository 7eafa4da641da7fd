"""From tokens to the experts' summed outputs, against one expert at a time in fp64."""

import torch
import torch.nn.functional as F

from torchtitan.ops.expert_ffn import expert_ffn
from torchtitan.ops.permute import sort_slots


def test_equals_each_expert_by_itself():
    T, D, HIDDEN, E, K = 20, 8, 12, 5, 2
    ids_TK = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])  # the last gets nothing
    x, weights = torch.randn(T, D).double(), torch.rand(T, K).double()
    w13, w2 = torch.randn(E, 2 * HIDDEN, D).double(), torch.randn(E, D, HIDDEN).double()
    leaves = [t.requires_grad_() for t in (x, w13, w2, weights)]
    out = expert_ffn(*leaves, sort_slots(ids_TK, E))
    expected = torch.zeros(T, D, dtype=torch.float64)
    for e in range(E):
        gate, up = (x @ w13[e].t()).chunk(2, dim=1)
        weight_T1 = (weights * (ids_TK == e)).sum(dim=1, keepdim=True)
        expected = expected + weight_T1 * ((F.silu(gate) * up) @ w2[e].t())
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves, grad))
    assert not actual[1][-1].any()
