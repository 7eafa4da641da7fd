"""The grouped product is one product a group, whichever way it is computed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.ops.grouped_mm import grouped_linear, grouped_mm_loop

COUNTS = {
    "uneven": [3, 0, 5, 1],
    "first empty": [0, 0, 4, 5],
    "last empty": [4, 5, 0, 0],
    "one group": [0, 9, 0, 0],
}


def grouped_mm(x: torch.Tensor, w_EKN: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return grouped_linear(x, w_EKN.transpose(1, 2), counts)


class SeesGroupedMM(TorchDispatchMode):
    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen |= func is torch.ops.aten._grouped_mm.default
        return func(*args, **(kwargs or {}))


def problem(counts: list[int], k: int, n: int, dtype: torch.dtype):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), k).to(dtype).requires_grad_()
    w = torch.randn(len(counts), k, n).to(dtype).requires_grad_()
    return x, w, torch.tensor(counts)


def expected(x: torch.Tensor, w: torch.Tensor, counts: list[int]) -> torch.Tensor:
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    return torch.stack([row @ w[group] for row, group in zip(x, groups, strict=True)])


@pytest.mark.parametrize("function", [grouped_mm, grouped_mm_loop])
@pytest.mark.parametrize("k, n", [(16, 8), (7, 5), (16, 5), (7, 8)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_product_and_gradients_are_those_of_each_row(function, dtype, tolerance, counts, k, n):
    x, w, counts_E = problem(counts, k, n, dtype)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    out, truth = function(x, w, counts_E), expected(exact_x, exact_w, counts)
    assert out.dtype == dtype
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    truth.backward(grad.double())
    for ours, twin in ((out, truth), (x.grad, exact_x.grad), (w.grad, exact_w.grad)):
        atol = tolerance * twin.abs().max().item()
        torch.testing.assert_close(ours.double(), twin, rtol=0, atol=atol)


def test_transposed_weights_as_the_experts_pass_them():
    x, _, counts = problem([2, 4, 3], 16, 8, torch.float32)
    w_ENK = torch.randn(3, 8, 16)
    out = grouped_mm(x, w_ENK.transpose(1, 2), counts)
    truth = expected(x, w_ENK.transpose(1, 2), [2, 4, 3])
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "k, n, dtype, fits",
    [
        (16, 8, torch.bfloat16, True),
        (8, 4, torch.float32, True),
        (16, 12, torch.bfloat16, False),  # 24 bytes: no multiple of 16
        (12, 16, torch.bfloat16, False),
        (8, 5, torch.float32, False),
        (16, 8, torch.float64, False),
    ],
)
def test_the_kernel_is_used_exactly_where_it_can_go(k, n, dtype, fits):
    with SeesGroupedMM() as mode:
        grouped_mm(*problem([3, 2], k, n, dtype))
    assert mode.seen == fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, n", [(16, 8), (7, 5)])
def test_no_rows_at_all_give_gradients_of_zero(k, n, dtype):
    x, w, counts = problem([0, 0], k, n, dtype)
    out = grouped_mm(x, w, counts)
    assert out.shape == (0, n)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_compiled_layer_without_rows_gives_gradients_of_zero():
    """A rank whose experts nobody chose, and one whose are chosen, run the same graph."""

    def layer(x, w, slots):
        return grouped_linear(x[slots.nonzero().squeeze(1)], w, torch.stack([slots.sum()]))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 16).bfloat16().requires_grad_()
    for chosen in ([1, 0, 1, 1], [0, 0, 0, 0]):
        slots = torch.tensor(chosen)
        grads = []
        for function in (layer, compiled):
            w = torch.ones(1, 8, 16).bfloat16().requires_grad_()
            with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
                function(x, w, slots).sum().backward()
            grads.append(w.grad)
        assert torch.equal(*grads)
        assert bool(grads[0].any()) == any(chosen)
