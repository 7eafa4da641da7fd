"""An all-to-all in two halves, start and finish, so that something may run between them, in the
backward pass, too: there the gradient starts where the rows were finished.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.overlap import give_way


class Exchange:
    """`sent[r]` rows go to rank r of the group, `received[r]` come from there. Use it once.

    The backward pass gives way to another before it waits for the gradient; in the forward pass
    that is the caller's part.
    """

    def __init__(self, received: list[int], sent: list[int], group: dist.ProcessGroup):
        self.received, self.sent, self.group = received, sent, group
        # On its way. Autograd can't hand it from node to node: it has the shape that the rows have
        # at the other end.
        self.gradient: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        """What is returned is on its way: it is for `finish` alone."""
        return _Start.apply(x.contiguous(), self)

    def finish(self, travelling: Tensor) -> Tensor:
        """The rows of all ranks, in order of the ranks."""
        return _Finish.apply(travelling, self)


def on_host(numbers: Tensor) -> list[int]:
    """A vector's values, as soon as they are known. Another pass may work until then, and what that
    has for the device isn't waited for."""
    if numbers.device.type != "cuda":
        give_way()
        return numbers.tolist()
    copy = torch.empty_like(numbers, device="cpu", pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    give_way()
    there.synchronize()
    return copy.tolist()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _send(x, exchange.received, exchange.sent, exchange.group)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        give_way()
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
        return gradient, None  # only for its shape


def _send(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    # The functional kind, whose result recomputation by operation can keep.
    return torch.ops._c10d_functional.all_to_all_single(x, received, sent, group.group_name)


def _wait(travelling: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(travelling)
