"""Rows that travel while other work runs: what runs in which order, and that the numbers stay."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchtitan.distributed.exchange import Exchange
from torchtitan.ops.expert_ffn import expert_ffn, expert_operator
from torchtitan.ops.fp8 import emulation
from torchtitan.ops.fp8.experts import fp8_expert_ffn, fp8_expert_operator
from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.ops.permute import RowOrder, sort_slots

T, K, E, D, F = 24, 2, 4, 128, 128
RECIPE = Fp8Recipe(emulate=True)


class ToItself(Exchange):
    """An exchange with nobody, which notes what it is told to do."""

    def __init__(self, events: list[str]):
        super().__init__(group=None)  # type: ignore[arg-type]
        self.events = events

    def _send(self, rows: Tensor, *, to_sender: bool) -> Tensor:
        self.events.append("gradient leaves" if to_sender else "tokens leave")
        return rows.clone()

    def _wait(self, travelling: Tensor, *, to_sender: bool) -> Tensor:
        self.events.append("gradient arrives" if to_sender else "tokens arrive")
        return travelling.clone()


def leaves() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (T, D), (E, 2 * F, D), (E, D, F), (T, K)
    made = (torch.randn(shape, generator=generator) for shape in shapes)
    x, w13, w2, weights = (each.requires_grad_() for each in made)
    return x, w13, w2, weights


def ids() -> Tensor:
    ids_TK = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(1))
    ids_TK[:5, 0] = -1  # experts of other ranks
    return ids_TK


def order() -> RowOrder:
    return sort_slots(ids(), E, num_rows=int((ids() >= 0).sum()))


def differentiate(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    wanted = [each for each in inputs if each.requires_grad]
    return torch.autograd.grad(out, wanted, torch.ones_like(out))


def test_the_gradient_of_the_tokens_leaves_before_the_weights_gradients(monkeypatch):
    events: list[str] = []
    product = emulation.rows_by_rows

    def noted(*args: Any) -> Tensor:
        events.append("gradient of a weight")
        return product(*args)

    monkeypatch.setattr(emulation, "rows_by_rows", noted)
    x, w13, w2, weights = leaves()
    exchange = ToItself(events)
    operator = fp8_expert_operator(RECIPE), w13, w2
    out = exchange.through(operator, exchange.start(x), weights, order())
    differentiate(out, (x, w13, w2, weights))
    assert events == [
        "tokens leave",
        "tokens arrive",
        "gradient leaves",
        "gradient of a weight",
        "gradient of a weight",
        "gradient arrives",
    ]


@pytest.mark.parametrize("frozen", [(), (1,), (1, 2)], ids=["all", "w13 frozen", "both frozen"])
def test_experts_in_an_exchange_have_the_gradients_of_experts_alone(frozen):
    inputs = leaves()
    for i in frozen:
        inputs[i].requires_grad_(False)
    x, w13, w2, weights = inputs
    exchange = ToItself([])
    operator = fp8_expert_operator(RECIPE), w13, w2
    travelled = exchange.through(operator, exchange.start(x), weights, order())
    alone = fp8_expert_ffn(x, w13, w2, weights, order(), RECIPE)
    assert torch.equal(travelled, alone)
    pairs = zip(differentiate(travelled, inputs), differentiate(alone, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="elsewhere experts are no operator")
def test_experts_in_bf16_have_the_gradients_of_experts_alone():
    inputs = [each.detach().cuda().bfloat16().requires_grad_() for each in leaves()[:3]]
    inputs.append(leaves()[3].detach().cuda().requires_grad_())
    x, w13, w2, weights = inputs
    rows = sort_slots(ids().cuda(), E, num_rows=T * K)
    operator = expert_operator(x, w2)
    assert operator is not None
    exchange = ToItself([])
    travelled = exchange.through((operator, w13, w2), exchange.start(x), weights, rows)
    alone = expert_ffn(x, w13, w2, weights, rows)
    assert torch.equal(travelled, alone)
    pairs = zip(differentiate(travelled, inputs), differentiate(alone, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_backward_pass_in_two_pieces_sends_the_gradient_once():
    """Schedules without bubbles differentiate inputs first, weights later."""
    x, w13, w2, weights = leaves()
    events: list[str] = []
    exchange = ToItself(events)
    operator = fp8_expert_operator(RECIPE), w13, w2
    out = exchange.through(operator, exchange.start(x), weights, order())
    pieces = [
        *torch.autograd.grad(out, (x, weights), torch.ones_like(out), retain_graph=True),
        *torch.autograd.grad(out, (w13, w2), torch.ones_like(out)),
    ]
    assert events.count("gradient leaves") == events.count("gradient arrives") == 1
    alone = fp8_expert_ffn(x, w13, w2, weights, order(), RECIPE)
    whole = torch.autograd.grad(alone, (x, weights, w13, w2), torch.ones_like(alone))
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))


def test_nothing_is_sent_to_tokens_without_a_gradient():
    """Below the first layer that is trained nobody waits for it."""
    x, w13, w2, weights = leaves()
    events: list[str] = []
    exchange = ToItself(events)
    operator = fp8_expert_operator(RECIPE), w13, w2
    out = exchange.through(operator, exchange.start(x.detach()), weights, order())
    torch.autograd.grad(out, (w13, w2, weights), torch.ones_like(out))
    assert "gradient leaves" not in events


def test_an_error_of_the_experts_leaves_no_callback_behind(monkeypatch):
    """The next backward pass would send its gradient in the wrong exchange."""
    x, w13, w2, weights = leaves()
    exchange = ToItself([])
    operator = fp8_expert_operator(RECIPE), w13, w2
    out = exchange.through(operator, exchange.start(x), weights, order())
    with monkeypatch.context() as patched:
        patched.setattr(emulation, "swiglu_backward", None)
        with pytest.raises(TypeError):
            differentiate(out, (x,))
    alone = fp8_expert_ffn(x, w13, w2, weights, order(), RECIPE)
    differentiate(alone, (x,))
    assert exchange.gradient is None
