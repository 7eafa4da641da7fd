"""The head with its loss in blocks equals whole logits and F.cross_entropy, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import linear_cross_entropy as module
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.ops.fp8 import quantize
from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.ops.fp8.weight import quantised
from torchtitan.ops.linear_cross_entropy import linear_cross_entropy


def inputs(T: int = 300, D: int = 16, V: int = 50):
    labels = torch.randint(0, V, (T,))
    labels[::7] = IGNORE_INDEX
    return (
        torch.randn(T, D, dtype=torch.float64, requires_grad=True),
        torch.randn(V, D, dtype=torch.float64, requires_grad=True),
        labels,
    )


@pytest.mark.parametrize("blocks", [1, 3])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, blocks):
    x, weight, labels = inputs()
    monkeypatch.setattr(module, "_MAX_LOGITS", 300 * 50 if blocks == 1 else 128 * 50)
    assert len(module._blocks(300, 50)) == blocks
    loss = linear_cross_entropy(x, weight, labels)
    (loss / 7).backward()
    grads = x.grad, weight.grad
    x.grad = weight.grad = None
    expected = F.cross_entropy(x @ weight.t(), labels, reduction="sum")
    (expected / 7).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, (x.grad, weight.grad))


def test_blocks_cover_every_token_once_in_whole_tiles():
    for T, V in [(1, 10), (127, 2**22), (16384, 129280), (1000, 2**21)]:
        blocks = module._blocks(T, V)
        assert [t for start, stop in blocks for t in range(start, stop)] == list(range(T))
        assert all(start % 128 == 0 for start, _ in blocks)


def test_without_gradients_only_the_loss_is_computed():
    x, weight, labels = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels)
    torch.testing.assert_close(loss, F.cross_entropy(x @ weight.t(), labels, reduction="sum"))
    assert not loss.requires_grad


def test_bf16_loss_is_summed_in_fp32():
    x, weight, labels = (t.detach().bfloat16() if t.is_floating_point() else t for t in inputs())
    loss = linear_cross_entropy(x, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, F.cross_entropy((x @ weight.t()).float(), labels, reduction="sum")
    )


def test_a_second_backward_pass_is_refused():
    x, weight, labels = inputs()
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


EMULATED = Fp8Recipe(emulate=True)


def fp8_inputs():
    x, weight, labels = inputs(T=300, D=160, V=208)
    return x.detach().float().requires_grad_(), weight.detach().float().requires_grad_(), labels


def by_hand(x, weight, labels) -> tuple[torch.Tensor, ...]:
    """Loss and gradients in fp64 from what was quantised, the logits' gradient included."""
    rows, blocks = quantize.by_rows(x), quantize.by_blocks(weight[None])
    weight = quantize.blocks_to_float(blocks)[0].double()
    logits = quantize.rows_to_float(rows).double() @ weight.t()
    grad = logits.softmax(1) - F.one_hot(labels.clamp(min=0), weight.size(0))
    grad[labels == IGNORE_INDEX] = 0.0
    grad_rows = quantize.by_rows(grad)
    columns = [
        quantize.columns_to_float(quantize.by_columns(quantize.rows_to_float(each), [len(x)]))
        for each in (grad_rows, rows)
    ]
    return (
        F.cross_entropy(logits, labels, reduction="sum"),
        quantize.rows_to_float(grad_rows).double() @ weight,
        columns[0].double().t() @ columns[1].double(),
    )


@pytest.mark.parametrize("blocks", [1, 3])
def test_in_fp8_products_are_those_of_the_quantised_numbers(monkeypatch, blocks):
    x, weight, labels = fp8_inputs()
    monkeypatch.setattr(module, "_MAX_LOGITS", 300 * 208 if blocks == 1 else 128 * 208)
    loss = linear_cross_entropy(x, weight, labels, EMULATED)
    (loss / 7).backward()
    expected, *grads = by_hand(x.detach(), weight.detach(), labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for leaf, grad in zip((x, weight), grads, strict=True):
        # Few numbers of the logits' gradient, which is fp32 here, round to FP8's other neighbour.
        assert (leaf.grad * 7 - grad).norm() < 2e-3 * grad.norm()


def test_in_fp8_loss_and_gradients_err_as_the_format_allows():
    """Three bits of a mantissa: 2^-4 at most, a third of it (rms) for each factor."""
    x, weight, labels = fp8_inputs()
    linear_cross_entropy(x, weight, labels, EMULATED).backward()
    ours = x.grad, weight.grad
    x.grad = weight.grad = None
    F.cross_entropy(x @ weight.t(), labels, reduction="sum").backward()
    for grad, exact in zip(ours, (x.grad, weight.grad), strict=True):
        error = (grad - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.1


def test_a_head_whose_weight_comes_in_fp8_gives_the_same_bits():
    x, weight, labels = fp8_inputs()
    linear_cross_entropy(x, weight, labels, EMULATED).backward()
    expected, x.grad = x.grad, None
    copy = quantised(weight.detach(), torch.float32, emulate=True).requires_grad_()
    linear_cross_entropy(x, copy, labels, EMULATED).backward()
    assert torch.equal(x.grad, expected) and torch.equal(copy.grad, weight.grad)


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_in_fp8_what_is_frozen_gets_no_gradient(frozen):
    x, weight, labels = fp8_inputs()
    full = linear_cross_entropy(x, weight, labels, EMULATED)
    full.backward()
    expected = {"x": x.grad, "weight": weight.grad}
    leaves = {"x": x, "weight": weight}
    for name, leaf in leaves.items():
        leaf.grad = None
        leaf.requires_grad_(frozen not in (name, "both"))
    loss = linear_cross_entropy(x, weight, labels, EMULATED)
    assert torch.equal(loss, full)
    if frozen == "both":
        return
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is None if name == frozen else torch.equal(leaf.grad, expected[name])
