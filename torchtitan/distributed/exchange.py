"""An all-to-all in two halves, start and finish, so that other work may run between them.

The same holds in the backward pass: the gradient's exchange starts at the backward of `finish`, and
is waited for at the backward of `start`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.overlap import yield_turn


class Exchange:
    """One all-to-all of rows, with gradients. Use it once.

    The backward pass yields its turn (overlap.py) before it waits for the gradient; in the forward
    pass the caller must.

    received: rows that come from each rank of the group.
    sent: rows that go to each rank.
    """

    def __init__(self, received: list[int], sent: list[int], group: dist.ProcessGroup):
        self.received, self.sent, self.group = received, sent, group
        # The gradient in flight, between the backward of `finish` and that of `start`. Autograd
        # can't pass it on: its shape is that of the rows at the other end.
        self.gradient: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        """Start sending x (rows, …). The result is in flight: only `finish` may use it."""
        return _Start.apply(x.contiguous(), self)

    def finish(self, travelling: Tensor) -> Tensor:
        """Wait for the rows of all ranks, in order of the ranks."""
        return _Finish.apply(travelling, self)


def on_host(numbers: Tensor) -> list[int]:
    """Copy a vector's values to the host; another pass may run until they are known.

    Waits for `numbers` only, not for the kernels that the other pass launches meanwhile.
    """
    if numbers.device.type != "cuda":
        yield_turn()
        return numbers.tolist()
    copy = torch.empty_like(numbers, device="cpu", pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    yield_turn()
    copied.synchronize()
    return copy.tolist()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _send(x, exchange.received, exchange.sent, exchange.group)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        yield_turn()
        gradient, exchange.gradient = exchange.gradient, None
        return _wait(gradient), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _wait(travelling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        sent, received = exchange.received, exchange.sent
        exchange.gradient = _send(gradient.contiguous(), received, sent, exchange.group)
        return gradient, None  # `_Start` ignores it; autograd checks its shape


def _send(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    # The functional collective: activation checkpointing by operation can keep its result.
    return torch.ops._c10d_functional.all_to_all_single(x, received, sent, group.group_name)


def _wait(travelling: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(travelling)
