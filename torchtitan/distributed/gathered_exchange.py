"""All tokens of a group to all its ranks, and their partial sums back, in halves between which
other work runs:

    forward pass     tokens are gathered      while their rows are sorted
                     partial sums travel      while shared experts compute
    backward pass    the sums' gradients      while shared experts differentiate
                     the tokens' gradients    while the experts' weight gradients are computed

Letters: T tokens of this rank, P tokens of all n ranks (n · T), D model dim.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.exchange import Wire
from torchtitan.distributed.overlap import yield_turn
from torchtitan.ops.expert_ffn import ExpertOperator, tokens_first
from torchtitan.ops.permute import RowOrder, sum_copies


class GatheredExchange:
    """One layer's exchange in one pass, with gradients. Use it once.

    wire, gradient_wire: how tokens travel, and the gradients of their sums; None = as they are.
    """

    def __init__(
        self, group: dist.ProcessGroup, wire: Wire | None = None, gradient_wire: Wire | None = None
    ):
        self.group = group
        self.wire, self.gradient_wire = wire, gradient_wire
        self.row: tuple[int, torch.dtype] = 0, torch.float32  # channels and dtype
        # Gradients in flight, from the backward pass of a later half to that of an earlier one.
        # Autograd can't pass them on: their shapes are those at the other end.
        self.of_sums: Tensor | None = None
        self.of_tokens: Tensor | None = None

    def start(self, x_TD: Tensor) -> Tensor:
        """Start gathering tokens. Only `arrive` or `through` may use the result."""
        self.row = x_TD.size(1), x_TD.dtype
        return _Start.apply(x_TD, self)

    def arrive(self, travelling: Tensor) -> Tensor:
        """Wait for the tokens of all ranks, in order of the ranks: (P, D)."""
        return _Arrive.apply(travelling, self)

    def through(
        self,
        operator: tuple[ExpertOperator, Tensor, Tensor],
        travelling: Tensor,
        weights_PK: Tensor,
        order: RowOrder,
    ) -> Tensor:
        """Pass the tokens through this rank's experts: partial sums (P, D); see `TokenExchange`."""
        passes, w13, w2 = operator
        return _Through.apply(travelling, w13, w2, weights_PK, order, passes, self)

    def start_back(self, sums_PD: Tensor) -> Tensor:
        """Start the way of partial sums to the tokens' own ranks. Only `finish` may use the
        result."""
        return _StartBack.apply(sums_PD, self)

    def finish(self, travelling: Tensor) -> Tensor:
        """Wait for the partial sums, and add them up in fp32: (T, D) in their dtype."""
        return _Finish.apply(travelling, self)

    def wait_for_tokens(self, travelling: Tensor) -> Tensor:
        """Return the tokens of all ranks (P, D)."""
        return _unpacked(_wait(travelling), self.wire, *self.row)

    def send_gradient(self, grad_PD: Tensor) -> None:
        """Start the way of the tokens' gradients to the tokens' own ranks."""
        self.of_tokens = _start_sums(grad_PD, self.group)


def gather_rows(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather rows of all ranks, in order of the ranks, and wait for them: (P, D)."""
    exchange = GatheredExchange(group)
    return exchange.arrive(exchange.start(x_TD))


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, exchange: GatheredExchange) -> Tensor:
        ctx.exchange = exchange
        return _start_gather(x_TD, exchange.group, exchange.wire)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        yield_turn()
        travelling, ctx.exchange.of_tokens = ctx.exchange.of_tokens, None
        return _finish_sums(travelling, ctx.exchange.group), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Tensor, exchange: GatheredExchange) -> Tensor:
        ctx.exchange, ctx.travelling = exchange, _placeholder(travelling)
        yield_turn()
        return exchange.wait_for_tokens(travelling)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send_gradient(grad_PD)
        return ctx.travelling, None


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
        exchange: GatheredExchange,
    ) -> Tensor:
        yield_turn()
        x_PD = exchange.wait_for_tokens(travelling)
        sums_PD, *kept = operator.forward(x_PD, w13, w2, weights_PK, *order, *operator.settings)
        *indices, some_empty = order
        ctx.save_for_backward(x_PD, *kept, w13, w2, weights_PK, *indices)
        ctx.settings = some_empty, *operator.settings
        ctx.operator, ctx.exchange = operator, exchange
        ctx.travelling = _placeholder(travelling)
        return sums_PD

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        exchange, trains = ctx.exchange, ctx.needs_input_grad[1:3]
        with tokens_first(exchange.send_gradient):
            grad_x, *of_weights, grad_weights = ctx.operator.backward(
                grad_PD.contiguous(), *ctx.saved_tensors, *ctx.settings, *trains
            )
        if exchange.of_tokens is None:  # planned, not computed
            exchange.send_gradient(grad_x)
        grad_w13, grad_w2 = (g if t else None for g, t in zip(of_weights, trains, strict=True))
        return ctx.travelling, grad_w13, grad_w2, grad_weights, None, None, None


class _StartBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums_PD: Tensor, exchange: GatheredExchange) -> Tensor:
        ctx.exchange = exchange
        return _start_sums(sums_PD, exchange.group)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        yield_turn()
        travelling, exchange.of_sums = exchange.of_sums, None
        return _unpacked(_wait(travelling), exchange.gradient_wire, *exchange.row), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travelling: Tensor, exchange: GatheredExchange) -> Tensor:
        ctx.exchange, ctx.travelling = exchange, _placeholder(travelling)
        yield_turn()
        return _finish_sums(travelling, exchange.group)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.of_sums = _start_gather(grad_TD, exchange.group, exchange.gradient_wire)
        return ctx.travelling, None


def _placeholder(travelling: Tensor) -> Tensor:
    """Return a gradient of its shape that nobody reads; autograd checks shapes."""
    return travelling.new_empty(()).expand(travelling.shape)


# Functional collectives, whose results recomputation by operation can keep.


def _start_gather(x_TD: Tensor, group: dist.ProcessGroup, wire: Wire | None) -> Tensor:
    rows = x_TD.contiguous() if wire is None else wire.pack(x_TD)
    ops = torch.ops._c10d_functional
    return ops.all_gather_into_tensor(rows, group.size(), group.group_name)


def _unpacked(rows: Tensor, wire: Wire | None, channels: int, dtype: torch.dtype) -> Tensor:
    return rows if wire is None else wire.unpack(rows, channels, dtype)


def _start_sums(x_PD: Tensor, group: dist.ProcessGroup) -> Tensor:
    sizes = [x_PD.size(0) // group.size()] * group.size()
    ops = torch.ops._c10d_functional
    return ops.all_to_all_single(x_PD.contiguous(), sizes, sizes, group.group_name)


def _finish_sums(travelling: Tensor, group: dist.ProcessGroup) -> Tensor:
    T = travelling.size(0) // group.size()
    return sum_copies(_wait(travelling), _copies_of(T, group.size(), travelling.device))


def _wait(travelling: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(travelling)


@lru_cache(maxsize=8)
def _copies_of(tokens: int, ranks: int, device: torch.device) -> Tensor:
    """(T, n) int32: the rows of each token among those of all ranks."""
    rows = torch.arange(ranks * tokens, dtype=torch.int32, device=device)
    return rows.view(ranks, tokens).T.contiguous()
