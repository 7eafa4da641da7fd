"""Expert parallelism whose message sizes are fixed, so that no host waits for a device.

Every rank of the EP group gets all tokens of the group, passes those that chose its experts through
them, and returns a partial sum for each token. Inside a node this costs little: with top-6 of 64
experts on 4 ranks, an all-to-all of exact size carries 84 % of these bytes.

    one all-gather of tokens, one of expert ids and weights → this rank's experts, as one operator →
    an all-to-all of equal parts → sums in fp32

and the same backwards. How many rows the experts get is known on the device only, so their buffers
have a bounded capacity (`RowCapacity`). No token is ever dropped for it: where a layer needed more,
the trainer does the whole step again with exact sizes, before weights change.

Letters: T tokens of this rank, P tokens of all n ranks (n · T), K top-k, L local experts, R rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.exchange import AddUp, Gather, gather_rows
from torchtitan.distributed.overlap import yield_turn
from torchtitan.distributed.token_dispatch import NO_WIRES, Wires
from torchtitan.ops.permute import sort_slots
from torchtitan.protocols.layers import MoELayer
from torchtitan.tools.utils import eager

# Capacities are a multiple of it: rows of a tensor then begin at aligned addresses in any dtype.
_ALIGNMENT = 16


@dataclass
class RowCapacity:
    """Bound on the rows that the experts of a rank get in a forward pass; one for all layers.

    factor: rows over the mean, T · K.
    exact: no bound; sizes are exact, which costs a host sync a layer.
    """

    factor: float
    exact: bool = False

    def rows(self, tokens: int, top_k: int, ranks: int, local_experts: int) -> int:
        """Return R, at most what `ranks · tokens` tokens can choose.

        tokens: T, of one rank.
        """
        bounded = ceil(self.factor * tokens * top_k / _ALIGNMENT) * _ALIGNMENT
        return min(bounded, ranks * tokens * min(top_k, local_experts))

    def grow(self, needed: float) -> None:
        """Make room for `needed` times the mean, and a quarter more."""
        self.factor = max(self.factor, 1.25 * needed)


def row_capacity(moes: Iterable[MoELayer]) -> RowCapacity | None:
    """Return the capacity that all layers share; None where sizes are exact."""
    for moe in moes:
        if isinstance(moe.dispatcher, AllGatherDispatcher):
            return moe.dispatcher.capacity
    return None


class GatherRecord(NamedTuple):
    """Record of `start_routed`.

    traffic: see `TokenDispatcher.dispatch`.
    overflow: () fp32, rows needed over the mean where these exceed the capacity, else 0.
    sums: the way back.
    """

    traffic: Tensor
    overflow: Tensor
    sums: AddUp


class AllGatherDispatcher:
    """All tokens to all ranks of `group`.

    exact: dispatcher of the same experts, for passes without gradients, experts that get rows (see
        `MoE`), and steps that are done again.
    num_experts: of all ranks.
    """

    whole_tokens = prefers_whole_tokens = True

    def __init__(
        self,
        exact: Any,
        group: dist.ProcessGroup,
        num_experts: int,
        capacity: RowCapacity,
        wires: Wires = NO_WIRES,
    ):
        self.exact = exact
        self.wire, self.gradient_wire = wires
        self.group = group
        self.local_experts = num_experts // group.size()
        self.capacity = capacity
        # As `exact` dispatches, so does this.
        self.dispatch, self.combine = exact.dispatch, exact.combine
        self.start_shared, self.finish_shared = exact.start_shared, exact.finish_shared

    @eager
    def start_routed(
        self, experts: Callable[..., Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Any]:
        """Bring all tokens here, through this rank's experts, and start the way back of the sums.

        See `WholeTokenDispatcher`; ids_TK is int64, weights_TK fp32.
        """
        if self.capacity.exact or not torch.is_grad_enabled():
            return self.exact.start_routed(experts, x_TD, ids_TK, weights_TK)
        (T, K), ranks = ids_TK.shape, self.group.size()
        # One message for both: expert ids are exact in fp32.
        slots = torch.cat((weights_TK, ids_TK.to(weights_TK.dtype)), dim=1)
        weights_PK, ids_PK = gather_rows(slots, self.group).split(K, dim=1)
        exchange = Gather(self.group, self.wire)
        travelling = exchange.start(x_TD)
        # While the tokens travel, their rows are sorted.
        ids_PK = ids_PK.detach().long() - self.group.rank() * self.local_experts
        here_PK = (ids_PK >= 0) & (ids_PK < self.local_experts)
        capacity = self.capacity.rows(T, K, ranks, self.local_experts)
        rows = here_PK.sum()
        # A CPU knows the number at once, and its operators want rows that have a meaning.
        num_rows = capacity if x_TD.is_cuda else min(capacity, int(rows))
        order = sort_slots(ids_PK.where(here_PK, -1), self.local_experts, num_rows=num_rows)
        overflow = (rows / (T * K)).where(rows > capacity, 0.0)
        yield_turn()
        sums_PD = experts(travelling, order, weights_PK.contiguous(), exchange)
        sums = AddUp(self.group, gradient_wire=self.gradient_wire)
        return sums.start(sums_PD), GatherRecord(self._traffic(ids_TK), overflow, sums)

    @eager
    def finish_routed(self, travelling: Tensor, record: Any) -> Tensor:
        """Add up the partial sums of all ranks, in fp32, at the tokens' own ranks: (T, D)."""
        if not isinstance(record, GatherRecord):
            return self.exact.finish_routed(travelling, record)
        yield_turn()
        return record.sums.finish(travelling)

    def _traffic(self, ids_TK: Tensor) -> Tensor:
        """(2, 3) int64: rows sent, and rows that one copy per expert would have sent."""
        tiers = cast(Tensor, self.exact.tier_of_rank)
        rank_N = (ids_TK // self.local_experts).flatten()
        rows = torch.zeros(2, 3, dtype=torch.int64, device=ids_TK.device)
        rows[0].scatter_add_(0, tiers, torch.full_like(tiers, ids_TK.size(0)))
        rows[1].scatter_add_(0, tiers[rank_N], torch.ones_like(rank_N))
        return rows
