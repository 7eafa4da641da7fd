"""Bring tokens to their experts and the results back: the interface, and the case of one rank.

A dispatcher is a plain object without state of the current batch; what `combine` needs travels in
the frozen record.
"""

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from torchtitan.ops.permute import ExpertOrder, expand_rows, reduce_rows, sort_by_expert


class TokenDispatcher(Protocol):
    """`combine(f(dispatch(x)))` sums, for every token, the outputs of its K experts."""

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Rows of this rank's experts.

        ids_TK: int64 experts of each token. weights_TK: their routing weights, fp32.

        Returns rows_RD sorted by expert; counts_L, int64 rows of each local expert; and a record
        whose `weights_R` holds the routing weight of every row.
        """
        ...

    def combine(self, rows_RD: Tensor, record: Any) -> Tensor:
        """Sum each token's rows (in fp32) into (T, D), in the rows' dtype."""
        ...


class LocalRecord(NamedTuple):
    """weights_R: routing weight of every row. order: how rows and tokens belong together."""

    weights_R: Tensor
    order: ExpertOrder


class LocalDispatcher:
    """All experts live on this rank: sort, and sum. No host sync."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, LocalRecord]:
        order = sort_by_expert(ids_TK, self.num_experts)
        weights_R = weights_TK.flatten()[order.copy_of_row_N]
        return expand_rows(x_TD, order), order.counts_E, LocalRecord(weights_R, order)

    def combine(self, rows_RD: Tensor, record: LocalRecord) -> Tensor:
        return reduce_rows(rows_RD, record.order)
