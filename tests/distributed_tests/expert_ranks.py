"""What the tests of dispatchers share, run inside of a rank: dispatchers, and routings in loops.

A routing is a list by rank of lists by token of expert ids. Experts stand evenly and in order on
the ranks, ranks on the nodes.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.all_gather_dispatch import AllGatherDispatcher, RowCapacity
from torchtitan.distributed.token_dispatch import AllToAllDispatcher, NodeLimitedDispatcher
from torchtitan.models.moe.dispatcher import TokenDispatcher
from torchtitan.tools.utils import local_device

Routing = list[list[list[int]]]
# Dispatcher, ranks of a node.
Way = tuple[str, int]


def ways(world_size: int) -> list[Way]:
    """Both dispatchers, on nodes of 1, 2 and 4 ranks (that all-to-all only tells apart)."""
    sizes = [size for size in (1, 2, 4) if size <= world_size]
    return [("all_to_all", 2)] + [("node_limited", size) for size in sizes]


def make_dispatcher(way: Way, num_experts: int) -> TokenDispatcher:
    kind, node_size = way
    if kind in ("all_to_all", "all_gather"):
        exact = AllToAllDispatcher(dist.group.WORLD, num_experts, node_size)
        if kind == "all_to_all":
            return exact
        return AllGatherDispatcher(exact, dist.group.WORLD, num_experts, RowCapacity(1e9))
    return NodeLimitedDispatcher(*_node_groups(node_size), num_experts)


@cache  # groups last as long as the pool
def _node_groups(node_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of this rank: those at its place on each node, and those of its node."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    places = [list(range(place, world_size, node_size)) for place in range(node_size)]
    nodes = [list(range(i, i + node_size)) for i in range(0, world_size, node_size)]
    between = [dist.new_group(ranks) for ranks in places]
    within = [dist.new_group(ranks) for ranks in nodes]
    return between[rank % node_size], within[rank // node_size]


def expected_traffic(
    way: Way, routing: Routing, experts_per_rank: int, rank: int
) -> list[list[int]]:
    """Rows that this rank sends, over all hops, to itself, in its node, to other nodes; and the
    copies that one per expert would have sent of its tokens."""
    kind, node_size = way
    sent, copies = [0, 0, 0], [0, 0, 0]

    def send(to: int, counted: list[int] = sent) -> None:
        counted[0 if to == rank else 1 if to // node_size == rank // node_size else 2] += 1

    for expert in sum(routing[rank], []):
        send(expert // experts_per_rank, copies)

    for sender, tokens in enumerate(routing):
        for experts in tokens:
            homes = {expert // experts_per_rank for expert in experts}
            if kind == "all_to_all":
                for home in homes if sender == rank else ():
                    send(home)
                continue
            for node in {home // node_size for home in homes}:
                relay = node * node_size + sender % node_size
                if sender == rank:
                    send(relay)
                for home in homes if relay == rank else ():
                    if home // node_size == node:
                        send(home)
    return [sent, copies]


def check_routing(all_ways: list[Way], routing: Routing, top_k: int, experts_per_rank: int) -> None:
    """Dispatch, let every expert compute something of its own, combine: on this rank, what comes
    in, what comes out, all gradients and the traffic are those of loops over tokens and experts.
    """
    for way in all_ways:
        _RoutingCheck(way, routing, top_k, experts_per_rank).run()


class _RoutingCheck:
    def __init__(self, way: Way, routing: Routing, top_k: int, experts_per_rank: int):
        self.way, self.routing, self.experts_per_rank = way, routing, experts_per_rank
        self.num_experts = experts_per_rank * dist.get_world_size()
        self.rank, dim = dist.get_rank(), 3
        generator = torch.Generator().manual_seed(1)

        def random(*size: int) -> Tensor:  # drawn on the CPU: the same numbers on every device
            numbers = torch.randn(*size, generator=generator, dtype=torch.float64)
            return numbers.to(local_device())

        self.factors_ED = random(self.num_experts, dim)
        num_tokens = [len(tokens) for tokens in routing]
        self.x = random(sum(num_tokens), dim).split(num_tokens)
        self.weights = random(sum(num_tokens), top_k).split(num_tokens)
        self.toward_TD = random(num_tokens[self.rank], dim)
        self.ids_TK = torch.tensor(
            routing[self.rank], dtype=torch.int64, device=local_device()
        ).view(-1, top_k)

    def run(self) -> None:
        x_TD = self.x[self.rank].clone().requires_grad_()
        weights_TK = self.weights[self.rank].clone().requires_grad_()
        dispatcher = make_dispatcher(self.way, self.num_experts)
        rows_RD, counts_L, record = dispatcher.dispatch(x_TD, self.ids_TK, weights_TK)
        self._check_arrivals(rows_RD, counts_L, record.weights_R)
        traffic = expected_traffic(self.way, self.routing, self.experts_per_rank, self.rank)
        assert record.traffic.tolist() == traffic, (self.way, record.traffic, traffic)
        first = self.rank * self.experts_per_rank
        local_LD = self.factors_ED[first : first + self.experts_per_rank]
        outputs_RD = torch.sin(rows_RD * local_LD.repeat_interleave(counts_L, dim=0))
        out_TD = dispatcher.combine(outputs_RD * record.weights_R.unsqueeze(1), record)
        (out_TD * self.toward_TD).sum().backward()
        self._check_results(out_TD, x_TD.grad, weights_TK.grad)

    def _check_arrivals(self, rows_RD: Tensor, counts_L: Tensor, weights_R: Tensor) -> None:
        """List for each local expert its tokens with its weights, no matter in which order."""
        assert len(rows_RD) == len(weights_R) == counts_L.sum(), (self.way, counts_L)
        arrived_RD = torch.cat((rows_RD, weights_R.unsqueeze(1)), dim=1).detach()
        for i, rows in enumerate(arrived_RD.split(counts_L.tolist())):
            expert = self.rank * self.experts_per_rank + i
            wanted = [
                (*x_D.tolist(), weights_K[experts.index(expert)].item())
                for x_TD, weights_TK, tokens in zip(self.x, self.weights, self.routing, strict=True)
                for x_D, weights_K, experts in zip(x_TD, weights_TK, tokens, strict=True)
                if expert in experts
            ]
            got = [tuple(row) for row in rows.tolist()]
            assert sorted(got) == sorted(wanted), (self.way, expert, got, wanted)

    def _check_results(self, out_TD: Tensor, grad_TD: Tensor, grad_TK: Tensor) -> None:
        x_TD = self.x[self.rank].clone().requires_grad_()
        weights_TK = self.weights[self.rank].clone().requires_grad_()
        outputs = [
            sum(
                weights_TK[t, k] * torch.sin(x_TD[t] * self.factors_ED[expert])
                for k, expert in enumerate(experts)
            )
            for t, experts in enumerate(self.routing[self.rank])
        ]
        assert out_TD.shape == grad_TD.shape == x_TD.shape and grad_TK.shape == weights_TK.shape
        if outputs:
            torch.testing.assert_close(out_TD, torch.stack(outputs), rtol=1e-12, atol=1e-12)
            (torch.stack(outputs) * self.toward_TD).sum().backward()
            torch.testing.assert_close(grad_TD, x_TD.grad, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grad_TK, weights_TK.grad, rtol=1e-12, atol=1e-12)
