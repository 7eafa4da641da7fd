"""Rows that travel between ranks, in two halves, start and finish, so that other work runs between.

The same holds in the backward pass: the gradient's way back starts at the backward of `finish`, and
is waited for at the backward of `start`. Where experts take the place of `finish` (`through`), it
starts as soon as the gradient of their inputs is there; their weights' gradients follow meanwhile.

Letters: T rows of this rank, P rows of all n ranks (n · T), D channels.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.overlap import yield_turn
from torchtitan.ops.expert_ffn import ExpertOperator, tokens_first
from torchtitan.ops.fp8.wire import pack, unpack
from torchtitan.ops.permute import RowOrder, sum_copies


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
    """One exchange of rows, with gradients. Use it once.

    The backward pass yields its turn (overlap.py) before it waits for the gradient; in the forward
    pass the caller must.

    wire, gradient_wire: how rows and their gradients travel; None = as they are.
    """

    def __init__(
        self, group: dist.ProcessGroup, wire: Wire | None = None, gradient_wire: Wire | None = None
    ):
        self.group = group
        self.wire, self.gradient_wire = wire, gradient_wire
        self.row: tuple[int, torch.dtype] = 0, torch.float32  # channels and dtype
        # The gradient in flight, between the backward of `finish` and that of `start`. Autograd
        # can't pass it on: its shape is that of the rows at the other end.
        self.gradient: Tensor | None = None
        self._gradient_left = False

    def start(self, x: Tensor) -> Tensor:
        """Start sending x (rows, …). Only `finish` or `through` may use the result."""
        if x.dim() == 2:
            self.row = x.size(1), x.dtype
        return _Start.apply(x.contiguous(), self)

    def finish(self, travelling: Tensor) -> Tensor:
        """Wait for the rows of all ranks, in order of the ranks."""
        return _Finish.apply(travelling, self)

    def through(
        self,
        operator: tuple[ExpertOperator, Tensor, Tensor],
        travelling: Tensor,
        weights_PK: Tensor,
        order: RowOrder,
    ) -> Tensor:
        """Wait for the rows, and pass them through experts; see `TokenExchange`."""
        passes, w13, w2 = operator
        return _Through.apply(travelling, w13, w2, weights_PK, order, passes, self)

    def receive(self, travelling: Tensor) -> Tensor:
        """Wait for what `finish` returns, without gradients."""
        return self._unpacked(self._wait(travelling, to_sender=False), self.wire)

    def send_gradient(self, grad: Tensor) -> None:
        """Start the way of the gradient of what `finish` returns; once.

        Pipelines that split the backward pass run it again for the weights' gradients.
        """
        if self._gradient_left:
            return
        self._gradient_left = True
        rows = grad.contiguous()
        if self.gradient_wire is not None:
            rows = self.gradient_wire.pack(rows)
        self.gradient = self._send(rows, to_sender=True)

    def keep_gradient(self) -> None:
        """Let `send_gradient` do nothing."""
        self._gradient_left = True

    def send(self, x: Tensor) -> Tensor:
        """Start sending, without gradients."""
        return self._send(x if self.wire is None else self.wire.pack(x), to_sender=False)

    def receive_gradient(self) -> Tensor:
        """Wait for the gradient of what `start` got."""
        yield_turn()
        travelling, self.gradient = self.gradient, None
        assert travelling is not None, "the gradient was not sent"
        return self._unpacked(self._wait(travelling, to_sender=True), self.gradient_wire)

    def _unpacked(self, rows: Tensor, wire: Wire | None) -> Tensor:
        return rows if wire is None else wire.unpack(rows, *self.row)

    def _send(self, rows: Tensor, *, to_sender: bool) -> Tensor:
        """Start the collective; of gradients, back to the rows' senders."""
        raise NotImplementedError

    def _wait(self, travelling: Tensor, *, to_sender: bool) -> Tensor:
        return _wait(travelling)


class AllToAll(Exchange):
    """Rows of exact numbers to each rank.

    received: rows that come from each rank of the group.
    sent: rows that go to each rank.
    """

    def __init__(
        self,
        received: list[int],
        sent: list[int],
        group: dist.ProcessGroup,
        wire: Wire | None = None,
        gradient_wire: Wire | None = None,
    ):
        super().__init__(group, wire, gradient_wire)
        self.received, self.sent = received, sent

    def _send(self, rows: Tensor, *, to_sender: bool) -> Tensor:
        output, split = self.received, self.sent
        if to_sender:
            output, split = split, output
        return _all_to_all(rows, output, split, self.group)


class Gather(Exchange):
    """All rows to all ranks, (T, D) to (P, D); gradients are added up at the rows' own ranks."""

    def _send(self, rows: Tensor, *, to_sender: bool) -> Tensor:
        return _to_own_ranks(rows, self.group) if to_sender else _to_all(rows, self.group)

    def _wait(self, travelling: Tensor, *, to_sender: bool) -> Tensor:
        return _add_up(travelling, self.group) if to_sender else _wait(travelling)


class AddUp(Exchange):
    """Partial sums of all rows to the rows' own ranks, where they are added up in fp32, (P, D) to
    (T, D); gradients go to all ranks."""

    def _send(self, rows: Tensor, *, to_sender: bool) -> Tensor:
        return _to_all(rows, self.group) if to_sender else _to_own_ranks(rows, self.group)

    def _wait(self, travelling: Tensor, *, to_sender: bool) -> Tensor:
        return _wait(travelling) if to_sender else _add_up(travelling, self.group)


def gather_rows(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the rows of all ranks, in order of the ranks: (P, D). Other work runs meanwhile."""
    exchange = Gather(group)
    travelling = exchange.start(x_TD)
    yield_turn()
    return exchange.finish(travelling)


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
        return exchange.send(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.receive_gradient(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.unread = exchange, _unread_gradient(travelling)
        return exchange.receive(travelling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send_gradient(grad)
        return ctx.unread, None


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        travelling: Tensor,
        w13: Tensor,
        w2: Tensor,
        weights_PK: Tensor,
        order: RowOrder,
        operator: ExpertOperator,
        exchange: Exchange,
    ) -> Tensor:
        x_PD = exchange.receive(travelling)
        sums_PD, *kept = operator.forward(x_PD, w13, w2, weights_PK, *order, *operator.settings)
        *indices, some_empty = order
        ctx.save_for_backward(x_PD, *kept, w13, w2, weights_PK, *indices)
        ctx.settings = some_empty, *operator.settings
        ctx.operator, ctx.exchange = operator, exchange
        ctx.unread = _unread_gradient(travelling)
        return sums_PD

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        exchange, trains = ctx.exchange, ctx.needs_input_grad[1:3]
        if not ctx.needs_input_grad[0]:  # nobody would wait for it
            exchange.keep_gradient()
        with tokens_first(exchange.send_gradient):
            grad_x, *of_weights, grad_weights = ctx.operator.backward(
                grad_PD.contiguous(), *ctx.saved_tensors, *ctx.settings, *trains
            )
        exchange.send_gradient(grad_x)  # of fake operators (plans), which don't call back
        grad_w13, grad_w2 = (g if t else None for g, t in zip(of_weights, trains, strict=True))
        return ctx.unread, grad_w13, grad_w2, grad_weights, None, None, None


def _unread_gradient(travelling: Tensor) -> Tensor:
    """Return a gradient for `_Start`, which ignores it; autograd checks its shape."""
    return travelling.new_empty(()).expand(travelling.shape)


# Functional collectives, whose results recomputation by operation can keep.


def _all_to_all(
    rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Tensor:
    return torch.ops._c10d_functional.all_to_all_single(rows, received, sent, group.group_name)


def _to_all(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    gather = torch.ops._c10d_functional.all_gather_into_tensor
    travelling = gather(rows, group.size(), group.group_name)
    # gloo copies what arrives into the result, in place and at some time. Autograd refuses to go on
    # where a view of it was made before, as FSDP makes of a module's inputs.
    return travelling if rows.is_cuda else _wait(travelling)


def _to_own_ranks(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    sizes = [rows.size(0) // group.size()] * group.size()
    return _all_to_all(rows, sizes, sizes, group)


def _add_up(travelling: Tensor, group: dist.ProcessGroup) -> Tensor:
    T = travelling.size(0) // group.size()
    return sum_copies(_wait(travelling), _copies_of(T, group.size(), travelling.device))


def _wait(travelling: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(travelling)


@lru_cache(maxsize=8)
def _copies_of(tokens: int, ranks: int, device: torch.device) -> Tensor:
    """(T, n) int32: the rows of each token among those of all ranks."""
    rows = torch.arange(ranks * tokens, dtype=torch.int32, device=device)
    return rows.view(ranks, tokens).T.contiguous()
