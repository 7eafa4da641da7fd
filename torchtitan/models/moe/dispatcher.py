"""Token dispatchers: the interface, and the dispatcher for experts that all live on this rank.

A dispatcher is a plain object without state of the current batch; what `combine` needs travels in
the frozen record.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from torchtitan.ops.permute import RowOrder, expand_rows, reduce_rows, sort_slots


class TokenDispatcher(Protocol):
    """Brings tokens to their experts and the results back: `combine(f(dispatch(x)))` sums, for
    every token, the outputs of its K experts."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Send tokens to their experts; return the rows of this rank's experts.

        x_TD: hidden states.
        ids_TK: int64, experts of each token.
        weights_TK: fp32, their routing weights.

        Returns rows_RD sorted by expert; counts_L, int64 rows of each local expert; and a record
        with `weights_R`, the routing weight of every row, and `traffic`, None where nothing
        travels: (2, 3) int64 rows sent (first line), and rows that one copy of a token per expert
        would have sent (second line), to this rank, to others of its node, and to other nodes.
        """
        ...

    def combine(self, rows_RD: Tensor, record: Any) -> Tensor:
        """Sum each token's rows, in fp32: (T, D) in the rows' dtype.

        record: from `dispatch`.
        """
        ...

    @property
    def gathers(self) -> bool:
        """Whether this is a `GatheringDispatcher` now."""
        ...

    def start_shared(self, layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        """Start the shared experts, to overlap with dispatch and combine.

        Returns what `finish_shared` takes.
        """
        ...

    def finish_shared(self, layer: Callable[[Tensor], Tensor], begun_TD: Tensor) -> Tensor:
        """Return the result of `layer(x)`.

        begun_TD: from `start_shared`.
        """
        ...


class GatheringDispatcher(TokenDispatcher, Protocol):
    """A dispatcher whose `gather_tokens` and `return_sums` can take the place of dispatch and
    combine, so that all between them is one operator: `return_sums(f(gather_tokens(x)))`."""

    def gather_tokens(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, RowOrder, Any]:
        """Bring whole tokens to this rank's experts, not yet a row for each expert.

        Arguments as of `dispatch`. Returns hidden states (P, D), weights (P, K), the order of their
        rows by local expert, and a record with `traffic`, and `overflow`: () fp32, rows needed over
        the mean where not all had room, else 0; None where there is always room.
        """
        ...

    def return_sums(self, sums_PD: Tensor, record: Any) -> Tensor:
        """Add up the partial sums of each token: (T, D).

        record: from `gather_tokens`.
        """
        ...


class NothingTravels(NamedTuple):
    """Record of `LocalDispatcher.gather_tokens`."""

    traffic: None = None
    overflow: None = None


class LocalRecord(NamedTuple):
    """Record of `LocalDispatcher`.

    weights_R: fp32, routing weight of every row.
    order: which rows belong to which tokens.
    """

    weights_R: Tensor
    order: RowOrder
    traffic: None = None


class LocalDispatcher:
    """Dispatcher for experts that all live on this rank: sorts rows, sums them. No host sync."""

    gathers = True

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, LocalRecord]:
        order = sort_slots(ids_TK, self.num_experts)
        weights_R = weights_TK.flatten()[order.slot_of_row_R]
        return expand_rows(x_TD, order), order.counts, LocalRecord(weights_R, order)

    def combine(self, rows_RD: Tensor, record: LocalRecord) -> Tensor:
        return reduce_rows(rows_RD, record.order)

    def gather_tokens(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, RowOrder, NothingTravels]:
        return x_TD, weights_TK, sort_slots(ids_TK, self.num_experts), NothingTravels()

    def return_sums(self, sums_PD: Tensor, record: NothingTravels) -> Tensor:
        return sums_PD

    def start_shared(self, layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        return x_TD

    def finish_shared(self, layer: Callable[[Tensor], Tensor], begun_TD: Tensor) -> Tensor:
        return layer(begun_TD)
