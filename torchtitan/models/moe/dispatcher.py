"""Token dispatchers: the interface, and the dispatcher for experts that all live on this rank.

A dispatcher is a plain object without state of the current batch; what the way back needs is in the
record.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from torchtitan.ops.expert_ffn import ExpertOperator
from torchtitan.ops.permute import RowOrder, counts_of, expand_rows, reduce_rows, sort_slots


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

        Returns rows_RD sorted by expert; counts_L, int32 rows of each local expert; and a record
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
    def whole_tokens(self) -> bool:
        """True for a `WholeTokenDispatcher`."""
        ...

    @property
    def prefers_whole_tokens(self) -> bool:
        """True where experts are always to get whole tokens; rows for each would be a detour."""
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


class WholeTokenDispatcher(TokenDispatcher, Protocol):
    """A dispatcher whose `start_routed` and `finish_routed` can take the place of dispatch, experts
    and combine: experts are one operator, which gets whole tokens instead of a row for each."""

    def start_routed(
        self, experts: Callable[..., Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Any]:
        """Bring tokens to this rank's experts, and start the way back of their partial sums.

        experts: called with tokens (P, D), the order of their rows by local expert, and weights
            (P, K); also with a `TokenExchange`, where the tokens are on their way.

        Other arguments as of `dispatch`. Returns the sums, and a record with `traffic`, and
        `overflow`: () fp32, rows needed over the mean where not all had room, else 0; None where
        there is always room. Other work may run until `finish_routed`.
        """
        ...

    def finish_routed(self, travelling: Tensor, record: Any) -> Tensor:
        """Add up the partial sums of each token: (T, D).

        travelling, record: from `start_routed`.
        """
        ...


class TokenExchange(Protocol):
    """Tokens that are on their way to experts; either method waits for them."""

    def finish(self, travelling: Tensor) -> Tensor:
        """Return the tokens (P, D)."""
        ...

    def through(
        self,
        operator: tuple[ExpertOperator, Tensor, Tensor],
        travelling: Tensor,
        weights_PK: Tensor,
        order: RowOrder,
    ) -> Tensor:
        """Pass the tokens through experts: partial sums (P, D). In the backward pass the tokens'
        gradient sets off before the weights' gradients are computed.

        operator: with w13 and w2, see `ops.linear.grouped_ffn_operator`.
        """
        ...


class NothingTravels(NamedTuple):
    """Record of `LocalDispatcher.start_routed`."""

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

    whole_tokens, prefers_whole_tokens = True, False

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, LocalRecord]:
        order = sort_slots(ids_TK, self.num_experts)
        weights_R = weights_TK.flatten()[order.slot_of_row_R]
        return expand_rows(x_TD, order), counts_of(order), LocalRecord(weights_R, order)

    def combine(self, rows_RD: Tensor, record: LocalRecord) -> Tensor:
        return reduce_rows(rows_RD, record.order)

    def start_routed(
        self, experts: Callable[..., Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, NothingTravels]:
        order = sort_slots(ids_TK, self.num_experts)
        return experts(x_TD, order, weights_TK), NothingTravels()

    def finish_routed(self, travelling: Tensor, record: NothingTravels) -> Tensor:
        return travelling

    def start_shared(self, layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        return x_TD

    def finish_shared(self, layer: Callable[[Tensor], Tensor], begun_TD: Tensor) -> Tensor:
        return layer(begun_TD)
