"""The way of tokens to experts on other ranks, in messages of exactly the size they need.

Two dispatchers implement the interface of models/moe/dispatcher.py. Experts are spread evenly and
in order over the ranks of an EP group, and these ranks over nodes:

    all-to-all     a token goes once to each *rank* that has experts of it
    node-limited   a token goes once to each *node* that has experts of it, to the rank at the
                   sender's own place there, which passes it on to the ranks inside the node

The host must know the sizes, which is one host sync a layer. Both dispatchers are made of hops. A
hop sends a row once to each destination, with the list of its experts at that destination and their
weights; on the way back the partial sums of the destinations (summed in fp32, sent in the rows'
dtype) are summed. Weights are applied on the expert's side; gradients flow back through the same
hops, those of the weights too.

Letters: P rows before or after a hop, K slots of a row (expert ids, −1 = empty), D model dim.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single

from torchtitan.distributed.exchange import AllToAll, Exchange, Wire, on_host
from torchtitan.distributed.overlap import yield_turn
from torchtitan.distributed.side_stream import SideStream
from torchtitan.distributed.tensor_parallel import gather, reduce_scatter
from torchtitan.ops.fp8.wire import packed_bytes
from torchtitan.ops.permute import RowOrder, counts_of, expand_rows, reduce_rows, sort_slots
from torchtitan.tools.utils import eager, local_device

# Of hidden states on their way out, and of gradients of those that came back.
Wires = tuple[Wire | None, Wire | None]
NO_WIRES: Wires = (None, None)


class Rows(NamedTuple):
    """Rows before or after a hop.

    x_PD: hidden states.
    ids_PK: int64, experts of each row, counted from the first one that this rank (or, between the
        two hops, this node) holds.
    weights_PK: fp32, their routing weights; those of empty slots mean nothing.
    """

    x_PD: Tensor
    ids_PK: Tensor
    weights_PK: Tensor


class HopRecord(NamedTuple):
    """Record of a hop, for its way back.

    order: order of the rows sent.
    sent: rows that went to each rank.
    received: rows that came from each rank.
    """

    order: RowOrder
    sent: list[int]
    received: list[int]


class Arrival(NamedTuple):
    """Rows that reach this rank's experts.

    rows: their hidden states are on their way, in `exchange`.
    hops: in the order they were taken.
    slots: copies of the rows, one for each expert.
    traffic: see `TokenDispatcher.dispatch`.
    """

    rows: Rows
    exchange: Exchange
    hops: tuple[HopRecord, ...]
    slots: int
    traffic: Tensor


class RoutedRecord(NamedTuple):
    """Record of `start_routed`, for `finish_routed`.

    traffic: see `TokenDispatcher.dispatch`.
    exchange: of the last way back, that of the first hop.
    hop: the first.
    """

    traffic: Tensor
    exchange: Exchange
    hop: HopRecord
    overflow: None = None


class Record(NamedTuple):
    """Record of `dispatch`, for `combine`.

    weights_R, traffic: see `TokenDispatcher.dispatch`.
    hops: in the order they were taken.
    order: order of the rows by local expert.
    """

    weights_R: Tensor
    traffic: Tensor
    hops: tuple[HopRecord, ...]
    order: RowOrder


class Hop:
    """Sends rows to the ranks of a group, each of which is responsible for `num_experts / size`
    experts.

    wires: how hidden states travel there, and the gradients of those that come back; None = as
        they are.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, wires: Wires = NO_WIRES):
        self.group = group
        self.wire, self.gradient_wire = wires
        self.size = group.size()
        self.experts_per_rank = num_experts // self.size

    def destinations(self, ids_PK: Tensor) -> Tensor:
        """Rank of each slot's expert, in a row's first slot for that rank only; −1 elsewhere."""
        ranks_PK = torch.div(ids_PK, self.experts_per_rank, rounding_mode="floor")
        same_PKK = ranks_PK.unsqueeze(2) == ranks_PK.unsqueeze(1)
        repeated_PK = same_PKK.tril(diagonal=-1).any(dim=2)
        return ranks_PK.masked_fill(repeated_PK | (ids_PK < 0), -1)

    def send(
        self, rows: Rows, destination_PK: Tensor, sent: list[int], received: list[int]
    ) -> tuple[Rows, HopRecord]:
        """Send each row once to each of its destinations; return the rows that arrive here.

        Arguments as of `start`.
        """
        (travelling, ids, weights), exchange, record = self.start(
            rows, destination_PK, sent, received
        )
        return Rows(exchange.finish(travelling), ids, weights), record

    def start(
        self, rows: Rows, destination_PK: Tensor, sent: list[int], received: list[int]
    ) -> tuple[Rows, Exchange, HopRecord]:
        """Start `send`: the hidden states of the rows returned are on their way in the exchange.

        destination_PK: int64, from `destinations`.
        sent: rows to each rank of the group.
        received: rows from each rank of the group.
        """
        order = sort_slots(destination_PK, self.size, num_rows=sum(sent))
        row_of = order.slot_of_row_R // destination_PK.size(1)
        rank_R = destination_PK.flatten()[order.slot_of_row_R]
        ids_RK = rows.ids_PK[row_of] - (rank_R * self.experts_per_rank).unsqueeze(1)
        at_destination_RK = (ids_RK >= 0) & (ids_RK < self.experts_per_rank)
        ids_RK = ids_RK.masked_fill(~at_destination_RK, -1)
        weights_RK = expand_rows(rows.weights_PK, order)
        # One message for both: expert ids are exact in fp32.
        slots = torch.cat((weights_RK, ids_RK.to(weights_RK.dtype)), dim=1)
        of_slots = AllToAll(received, sent, self.group)
        of_x = AllToAll(received, sent, self.group, wire=self.wire)
        slots, x = of_slots.start(slots), of_x.start(expand_rows(rows.x_PD, order))
        yield_turn()
        weights, ids = of_slots.finish(slots).chunk(2, dim=1)
        return Rows(x, ids.detach().long(), weights), of_x, HopRecord(order, sent, received)

    def send_back(self, x_PD: Tensor, record: HopRecord) -> Tensor:
        """Return the rows that came with `send` to their senders, which sum each row's copies."""
        return self.finish_back(*self.start_back(x_PD, record), record)

    def start_back(self, x_PD: Tensor, record: HopRecord) -> tuple[Tensor, Exchange]:
        """Start `send_back`."""
        lists = record.sent, record.received
        exchange = AllToAll(*lists, self.group, gradient_wire=self.gradient_wire)
        return exchange.start(x_PD), exchange

    def finish_back(self, travelling: Tensor, exchange: Exchange, record: HopRecord) -> Tensor:
        """Finish `send_back`; another pass may run meanwhile."""
        yield_turn()
        return reduce_rows(exchange.finish(travelling), record.order)

    def exchange_counts(self, counts: Tensor) -> Tensor:
        """Send line r of counts (size, …), int64, to rank r; return the lines received, by rank."""
        # The functional collective: activation checkpointing by operation can keep its result.
        return all_to_all_single(counts.contiguous(), None, None, self.group)


def count_destinations(destination_PK: Tensor, num_destinations: int) -> Tensor:
    """Count the slots of each destination (−1 = none): (num_destinations,) int64. No host sync."""
    bins = destination_PK.flatten() + 1
    ones = torch.ones_like(bins)
    return ones.new_zeros(num_destinations + 1).scatter_add_(0, bins, ones)[1:]


class ExactDispatcher:
    """Base of the dispatchers, whose messages have exactly the size they need.

    hops: a row's way from its own rank to those of its experts.
    """

    whole_tokens, prefers_whole_tokens = True, False

    def __init__(self, hops: tuple[Hop, ...]):
        self.hops = hops
        self.local_experts = hops[-1].experts_per_rank
        self.side_stream = SideStream()

    def bring(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Arrival:
        """Send tokens to their experts' ranks."""
        raise NotImplementedError

    @eager  # split sizes of the all-to-all depend on the data
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Record]:
        return _into_expert_order(self.bring(x_TD, ids_TK, weights_TK), self.local_experts)

    @eager
    def combine(self, rows_RD: Tensor, record: Record) -> Tensor:
        x_PD = reduce_rows(rows_RD, record.order)
        for hop, its_record in zip(self.hops[::-1], record.hops[::-1], strict=True):
            x_PD = hop.send_back(x_PD, its_record)
        return x_PD

    @eager
    def start_routed(
        self, experts: Callable[..., Tensor], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, RoutedRecord]:
        rows, exchange, hops, slots, traffic = self.bring(x_TD, ids_TK, weights_TK)
        order = sort_slots(rows.ids_PK, self.local_experts, num_rows=slots)
        x_PD = experts(rows.x_PD, order, rows.weights_PK.contiguous(), exchange)
        for hop, record in zip(self.hops[:0:-1], hops[:0:-1], strict=True):
            x_PD = hop.send_back(x_PD, record)
        travelling, exchange = self.hops[0].start_back(x_PD, hops[0])
        return travelling, RoutedRecord(traffic, exchange, hops[0])

    @eager
    def finish_routed(self, travelling: Tensor, record: RoutedRecord) -> Tensor:
        return self.hops[0].finish_back(travelling, record.exchange, record.hop)

    def start_shared(self, layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        return self.side_stream.begin(layer, x_TD)

    def finish_shared(self, layer: Callable[[Tensor], Tensor], begun_TD: Tensor) -> Tensor:
        return self.side_stream.end(layer, begun_TD)


class AllToAllDispatcher(ExactDispatcher):
    """One copy of a token per destination rank.

    ranks_per_node: consecutive ranks of the group that share a node; the traffic inside of nodes
        and between them is counted apart.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        ranks_per_node: int,
        wires: Wires = NO_WIRES,
    ):
        self.hop = Hop(group, num_experts, wires)
        super().__init__((self.hop,))
        self.tier_of_rank = _tiers(group, ranks_per_node)

    def bring(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Arrival:
        hop = self.hop
        destination_TK = hop.destinations(ids_TK)
        sent = count_destinations(destination_TK, hop.size)
        slots = count_destinations(ids_TK // hop.experts_per_rank, hop.size)
        received = hop.exchange_counts(torch.stack((sent, slots), dim=1))
        # host sync: the all-to-all wants its split sizes as integers
        counts = on_host(torch.cat((sent.unsqueeze(1), received), dim=1).T.flatten())
        sent_rows, received_rows, received_slots = _split_list(counts, [hop.size] * 3)
        rows, exchange, record = hop.start(
            Rows(x_TD, ids_TK, weights_TK), destination_TK, sent_rows, received_rows
        )
        traffic = torch.stack([_by_tier(rows, self.tier_of_rank) for rows in (sent, slots)])
        return Arrival(rows, exchange, (record,), sum(received_slots), traffic)


class NodeLimitedDispatcher(ExactDispatcher):
    """One copy of a token per destination node, then one per rank inside it.

    between: the ranks at this rank's place on each node, by node.
    within: the ranks of this node.
    """

    def __init__(
        self,
        between: dist.ProcessGroup,
        within: dist.ProcessGroup,
        num_experts: int,
        wires: Wires = NO_WIRES,
    ):
        self.between = Hop(between, num_experts, wires)
        self.within = Hop(within, self.between.experts_per_rank, wires)
        super().__init__((self.between, self.within))
        self.tier_of_node = _tiers(between, 1)
        self.tier_of_rank = _tiers(within, within.size())
        # Tier of every rank of the EP group, by node.
        self.tier_of_copy = self.tier_of_node.repeat_interleave(within.size())
        self.tier_of_copy[self.tier_of_copy == 0] = self.tier_of_rank

    def bring(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Arrival:
        between, within = self.between, self.within
        to_node_TK = between.destinations(ids_TK)
        out, relayed, arriving, copies = self._counts(ids_TK, to_node_TK)
        # host sync: split sizes of both hops at once; (rows out, in), (relayed out, in), slots in
        counts = on_host(torch.cat((out.T.flatten(), relayed.flatten(), arriving.T.flatten())))
        sizes = [between.size] * 2 + [within.size] * 3
        to_nodes, from_nodes, to_ranks, from_ranks, slots = _split_list(counts, sizes)

        rows, first = between.send(Rows(x_TD, ids_TK, weights_TK), to_node_TK, to_nodes, from_nodes)
        rows, exchange, second = within.start(
            rows, within.destinations(rows.ids_PK), to_ranks, from_ranks
        )
        rows_sent = _by_tier(out[:, 0], self.tier_of_node) + _by_tier(
            relayed[:, 0], self.tier_of_rank
        )
        traffic = torch.stack((rows_sent, _by_tier(copies, self.tier_of_copy)))
        return Arrival(rows, exchange, (first, second), sum(slots), traffic)

    def _counts(self, ids_TK: Tensor, to_node_TK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Exchange the sizes of both hops ahead of them, so that the host waits only once.

        Each sender tells its peer on node n how many rows it sends to that node, and for each rank
        of the node, how many of these rows and slots are relayed to it.

        Returns int64
            out (nodes, 2): rows to and from each node;
            relayed (ranks, 1): rows to relay to each rank of this node;
            arriving (ranks, 2): rows and slots that come from each rank of this node;
            copies (nodes · ranks): rows that one copy of a token per expert would send to each rank
            of the EP group.
        """
        nodes, ranks = self.between.size, self.within.size
        rank_TK = torch.div(ids_TK, self.local_experts, rounding_mode="floor")
        same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
        first_TK = rank_TK.masked_fill(same_TKK.tril(diagonal=-1).any(dim=2), -1)
        rows_out = count_destinations(to_node_TK, nodes)
        onward = torch.stack(
            [count_destinations(table, nodes * ranks) for table in (first_TK, rank_TK)]
        )
        send_counts = torch.cat(
            (rows_out.view(nodes, 1), onward.view(2, nodes, ranks).swapaxes(0, 1).flatten(1)), dim=1
        )
        recv_counts = self.between.exchange_counts(send_counts)
        rows_in, relayed = recv_counts[:, 0], recv_counts[:, 1:].sum(dim=0).view(2, ranks).T
        arriving = self.within.exchange_counts(relayed)
        return torch.stack((rows_out, rows_in), dim=1), relayed[:, :1], arriving, onward[1]


class SplitExpertsDispatcher:
    """Expert tensor parallelism around another dispatcher.

    Each rank of `group` holds a part of the hidden channels of the same experts: all of them get
    the tokens of all, and their outputs, partial sums, are added.
    """

    whole_tokens = prefers_whole_tokens = False

    def __init__(self, inner: Any, group: dist.ProcessGroup):
        self.inner = inner
        self.group = group

    @eager
    def dispatch(
        self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        return self.inner.dispatch(*(gather(t, 0, self.group) for t in (x_TD, ids_TK, weights_TK)))

    @eager
    def combine(self, rows_RD: Tensor, record: Any) -> Tensor:
        return reduce_scatter(self.inner.combine(rows_RD, record), 0, self.group)

    def start_shared(self, layer: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        return self.inner.start_shared(layer, x_TD)

    def finish_shared(self, layer: Callable[[Tensor], Tensor], begun_TD: Tensor) -> Tensor:
        return self.inner.finish_shared(layer, begun_TD)


def _into_expert_order(arrival: Arrival, num_experts: int) -> tuple[Tensor, Tensor, Record]:
    """Copy each row that arrived for each of its local experts, sorted by expert."""
    travelling, ids_PK, weights_PK = arrival.rows
    order = sort_slots(ids_PK, num_experts, num_rows=arrival.slots)
    weights_R = weights_PK.flatten()[order.slot_of_row_R]
    rows_RD = expand_rows(arrival.exchange.finish(travelling), order)
    for tensor in (rows_RD, weights_R):  # one compiled graph for any number of rows
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return rows_RD, counts_of(order), Record(weights_R, arrival.traffic, arrival.hops, order)


def _tiers(group: dist.ProcessGroup, ranks_per_node: int) -> Tensor:
    """Distance of each rank of the group: 0 this rank, 1 another of its node, 2 another node."""
    me, ranks = group.rank(), torch.arange(group.size(), device=local_device())
    tiers = torch.where(ranks // ranks_per_node == me // ranks_per_node, 1, 2)
    tiers[me] = 0
    return tiers


def _by_tier(rows: Tensor, tiers: Tensor) -> Tensor:
    return rows.new_zeros(3).scatter_add_(0, tiers, rows)


def _split_list(numbers: list[int], sizes: list[int]) -> list[list[int]]:
    rest = iter(numbers)
    return [list(islice(rest, size)) for size in sizes]


def bytes_per_row(dim: int, top_k: int, dtype: torch.dtype, *, fp8: bool = False) -> int:
    """Bytes that one row sent to another rank costs, forward and backward.

    Dispatch and combine, and the gradients of both: four times a hidden state, and twice (dispatch
    and its gradients) the slots: K routing weights and K expert ids in fp32. A layer that is
    recomputed sends the forward half once more. (Counts are sent once a layer and are left out.)

    fp8: hidden states go out in FP8, as do the gradients of those that come back.
    """
    whole = dim * dtype.itemsize
    out = packed_bytes(dim) if fp8 else whole
    return 2 * out + 2 * whole + 2 * 2 * top_k * torch.float32.itemsize
