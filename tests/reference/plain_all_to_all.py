"""The baseline of expert parallelism: one copy of a token per chosen expert, by a flat all-to-all.

What most trainers do, and what our dispatchers are measured against. Copies travel sorted by
expert, every output comes back as a row of its own, and the token's home rank weights and sums
them: only hidden states and expert counts cross the network. Plain indexing throughout; autograd
does the rest.

Letters: T tokens, K experts of each, N = T · K copies, L local experts, R rows received.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class PlainRecord(NamedTuple):
    """weights_R: None, as weights are applied at home. traffic: see `TokenDispatcher.dispatch`.

    weights_TK: the routing weights. order_N: copies by expert. order_R: received rows by local
    expert. sent, received: rows to and from each rank.
    """

    weights_R: None
    traffic: Tensor
    weights_TK: Tensor
    order_N: Tensor
    order_R: Tensor
    sent: list[int]
    received: list[int]


class PlainAllToAllDispatcher:
    """`TokenDispatcher` for experts spread in order over `group`, for `score_before_experts` off.

    ranks_per_node: consecutive ranks that share a node, for the traffic.
    """

    whole_tokens = prefers_whole_tokens = False

    def __init__(self, group: dist.ProcessGroup, num_experts: int, ranks_per_node: int):
        self.group = group
        self.num_experts = num_experts
        self.local_experts = num_experts // group.size()
        self.ranks_per_node = ranks_per_node

    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, PlainRecord]:
        order_N = ids_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=self.num_experts)
        theirs_E = torch.empty_like(counts_E)  # from each rank, its counts for our experts
        dist.all_to_all_single(theirs_E, counts_E, group=self.group)
        sent = counts_E.view(-1, self.local_experts).sum(dim=1)
        received = theirs_E.view(-1, self.local_experts).sum(dim=1).tolist()
        copies_ND = x_TD[order_N // ids_TK.size(1)]
        rows_RD = all_to_all_single_autograd(copies_ND, received, sent.tolist(), self.group)

        expert_R = torch.arange(self.num_experts) % self.local_experts
        order_R = expert_R.repeat_interleave(theirs_E).argsort(stable=True)
        record = PlainRecord(
            None, self._traffic(sent), weights_TK, order_N, order_R, sent.tolist(), received
        )
        return rows_RD[order_R], theirs_E.view(-1, self.local_experts).sum(dim=0), record

    def combine(self, rows_RD: Tensor, record: PlainRecord) -> Tensor:
        rows_RD = rows_RD[record.order_R.argsort()]
        copies_ND = all_to_all_single_autograd(rows_RD, record.sent, record.received, self.group)
        copies_TKD = copies_ND[record.order_N.argsort()].unflatten(0, record.weights_TK.shape)
        return (copies_TKD * record.weights_TK.unsqueeze(-1)).sum(dim=1).to(rows_RD.dtype)

    def start_shared(self, layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        return x_TD

    def finish_shared(self, layer: Callable[[Tensor], Tensor], begun_TD: Tensor) -> Tensor:
        return layer(begun_TD)

    def _traffic(self, sent: Tensor) -> Tensor:
        me, rows_sent = self.group.rank(), torch.zeros(3, dtype=torch.int64)
        for rank, rows in enumerate(sent.tolist()):
            same_node = rank // self.ranks_per_node == me // self.ranks_per_node
            rows_sent[0 if rank == me else 1 if same_node else 2] += rows
        return rows_sent.expand(2, 3)
