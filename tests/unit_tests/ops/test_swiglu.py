"""SwiGLU's gate against its formula, and what a row's weight does."""

import torch

from torchtitan.ops.swiglu import swiglu


def test_gate_times_sigmoid_of_gate_times_up():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(swiglu(gate, up), expected)
    weights = torch.randn(5, dtype=torch.float64)
    rows = [weight * row for weight, row in zip(weights, expected, strict=True)]
    torch.testing.assert_close(swiglu(gate, up, weights), torch.stack(rows))


def test_fp32_weights_do_not_change_the_dtype_nor_lose_their_digits():
    torch.manual_seed(0)
    gate, up = torch.randn(2, 50, 3).bfloat16()
    weights = torch.rand(50)
    out = swiglu(gate, up, weights)
    assert out.dtype == torch.bfloat16
    expected = (swiglu(gate, up).double() * weights.double()[:, None]).float().bfloat16()
    assert torch.equal(out, expected)


def test_gradients_reach_gate_up_and_weights():
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (gate, up, weights))
