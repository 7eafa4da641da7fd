"""An all-to-all in two halves, start and finish, so that other work may run between them.

The same holds in the backward pass: the gradient's exchange starts at the backward of `finish`, and
is waited for at the backward of `start`.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.overlap import yield_turn
from torchtitan.ops.fp8.wire import pack, unpack


class Wire(NamedTuple):
    """How hidden states travel in FP8.

    kind: e4m3 or e5m2.
    emulate: quantise in plain torch.
    """

    kind: torch.dtype
    emulate: bool

    def pack(self, x: Tensor) -> Tensor:
        return pack(x, self.kind, emulate=self.emulate)

    def unpack(self, packed: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        return unpack(packed, channels, self.kind, dtype)


class Exchange:
    """One all-to-all of rows, with gradients. Use it once.

    The backward pass yields its turn (overlap.py) before it waits for the gradient; in the forward
    pass the caller must.

    received: rows that come from each rank of the group.
    sent: rows that go to each rank.
    wire, gradient_wire: how rows and their gradients travel; None = as they are.
    """

    def __init__(
        self,
        received: list[int],
        sent: list[int],
        group: dist.ProcessGroup,
        wire: Wire | None = None,
        gradient_wire: Wire | None = None,
    ):
        self.received, self.sent, self.group = received, sent, group
        self.wire, self.gradient_wire = wire, gradient_wire
        self.row: tuple[int, torch.dtype] = 0, torch.float32  # channels and dtype
        # The gradient in flight, between the backward of `finish` and that of `start`. Autograd
        # can't pass it on: its shape is that of the rows at the other end.
        self.gradient: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        """Start sending x (rows, …). The result is in flight: only `finish` may use it."""
        if x.dim() == 2:
            self.row = x.size(1), x.dtype
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
        if exchange.wire is not None:
            x = exchange.wire.pack(x)
        return _send(x, exchange.received, exchange.sent, exchange.group)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        yield_turn()
        travelling, exchange.gradient = exchange.gradient, None
        gradient = _wait(travelling)
        if exchange.gradient_wire is not None:
            gradient = exchange.gradient_wire.unpack(gradient, *exchange.row)
        return gradient, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, travelling.shape
        arrived = _wait(travelling)
        if exchange.wire is not None:
            arrived = exchange.wire.unpack(arrived, *exchange.row)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        sent, received = exchange.received, exchange.sent
        rows = gradient.contiguous()
        if exchange.gradient_wire is not None:
            rows = exchange.gradient_wire.pack(rows)
        exchange.gradient = _send(rows, received, sent, exchange.group)
        # `_Start` ignores it; autograd checks its shape.
        return gradient.new_empty(()).expand(ctx.shape), None


def _send(x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    # The functional collective: activation checkpointing by operation can keep its result.
    return torch.ops._c10d_functional.all_to_all_single(x, received, sent, group.group_name)


def _wait(travelling: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(travelling)
