"""The head with its loss in blocks equals whole logits and F.cross_entropy, in fp64."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.ops import linear_cross_entropy as module
from torchtitan.ops.cross_entropy import IGNORE_INDEX
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
