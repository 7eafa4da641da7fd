"""Interleaved passes: the order of work, and what becomes of an error."""

import pytest
import torch

from torchtitan.distributed import overlap
from torchtitan.distributed.overlap import interleave, yield_turn


def passing(log: list, name: str, stops: int, error: Exception | None = None):
    def run() -> None:
        for n in range(stops):
            log.append(f"{name}{n}")
            yield_turn()
        log.append(f"{name} ends")
        if error is not None:
            raise error

    return run


def test_each_works_until_it_gives_way_and_the_longer_one_ends_alone():
    log: list[str] = []
    interleave(passing(log, "a", 2), passing(log, "b", 4))
    assert log == ["a0", "b0", "a1", "b1", "a ends", "b2", "b3", "b ends"]
    log.clear()
    interleave(passing(log, "a", 3), passing(log, "b", 0))
    assert log == ["a0", "b ends", "a1", "a2", "a ends"]
    log.clear()
    interleave(passing(log, "a", 0), passing(log, "b", 1))
    assert log == ["a ends", "b0", "b ends"]


@pytest.mark.parametrize("failing", ["a", "b", "both"])
def test_an_error_of_either_is_raised(failing):
    log: list[str] = []
    errors = [ValueError(n) if failing in (n, "both") else None for n in "ab"]
    with pytest.raises(ValueError):
        interleave(passing(log, "a", 2, errors[0]), passing(log, "b", 2, errors[1]))
    assert "b ends" in log and overlap._turns is None
    yield_turn()  # alone again: nobody to wait for


def test_a_backward_pass_gives_way_inside_of_autograd():
    log: list[str] = []

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            log.append("b0")
            yield_turn()
            log.append("b1")
            return 2 * grad

    x = torch.ones(2, requires_grad=True)
    y = Exchange.apply(x).sum()
    interleave(passing(log, "a", 1), y.backward)
    assert log == ["a0", "b0", "a ends", "b1"]
    assert x.grad.tolist() == [2, 2]
