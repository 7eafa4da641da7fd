"""The traffic meter against arithmetic on the routing: what crosses nodes, and how often."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed_tests.expert_ranks import Way, expected_traffic, make_dispatcher
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.models.moe.balancing import record_load, step_loads
from torchtitan.models.moe.dispatcher import LocalDispatcher
from torchtitan.models.moe.load import RoutingLoad
from torchtitan.models.moe.moe import TokenChoiceTopKRouter
from torchtitan.tools.utils import local_device


def route(args: MoEArgs, num_tokens: int, rank: int) -> Tensor:
    """Experts (T, K) that the router chooses from independent normal logits."""
    router = TokenChoiceTopKRouter.of(args.routing, dim=args.num_experts)
    torch.nn.init.eye_(router.gate.weight)
    generator = torch.Generator().manual_seed(rank)
    # On the CPU, so that the choice is the same whatever the device of the dispatchers.
    ids_TK = router(torch.randn(num_tokens, args.num_experts, generator=generator))[1]
    return ids_TK.to(local_device())


def send_tokens(way: Way, args: MoEArgs, num_tokens: int) -> tuple[Tensor, Tensor]:
    """This rank's routing and what the meter says about it."""
    ids_TK = route(args, num_tokens, dist.get_rank())
    dispatcher = make_dispatcher(way, args.num_experts)
    x_TD = torch.randn(num_tokens, 2, device=ids_TK.device)
    weights_TK = torch.ones(ids_TK.shape, device=ids_TK.device)
    return ids_TK.cpu(), dispatcher.dispatch(x_TD, ids_TK, weights_TK)[2].traffic.cpu()


def remote_places(ids_K: Tensor, experts_per_place: int, experts_per_node: int, node: int) -> int:
    """Different places (ranks or nodes) that one token's experts stand on, outside of `node`."""
    away = [e for e in ids_K.tolist() if e // experts_per_node != node]
    return len({e // experts_per_place for e in away})


GROUPED = {"num_expert_groups": 4, "num_limited_groups": 2}


@pytest.mark.parametrize("groups", [{}, GROUPED], ids=["no groups", "2 of 4 groups"])
@pytest.mark.parametrize("world_size, node_size", [(4, 2), (8, 2), (8, 4)])
def test_what_crosses_nodes_is_one_row_for_each_place(ranks, world_size, node_size, groups):
    """A place: of the node-limited dispatcher a node, of all-to-all a rank."""
    args = MoEArgs(num_experts=32, top_k=6, **groups)
    per_rank = 32 // world_size
    per_node = per_rank * node_size
    for kind, per_place in (("node_limited", per_node), ("all_to_all", per_rank)):
        results = ranks(world_size).run(send_tokens, (kind, node_size), args, 50)
        for rank, (ids_TK, traffic) in enumerate(results):
            places = [
                remote_places(ids_K, per_place, per_node, rank // node_size) for ids_K in ids_TK
            ]
            assert traffic[0, 2] == sum(places), (kind, rank)
            assert traffic[1].sum() == 50 * 6


def test_with_a_group_a_node_no_token_crosses_to_more_nodes_than_it_may_use_groups(ranks):
    """One token at a time, so that the meter can't hide one behind another."""
    limited = MoEArgs(num_experts=32, top_k=8, **GROUPED)
    free = MoEArgs(num_experts=32, top_k=8)
    most = [
        max(
            traffic[0, 2].item()
            for one_by_one in ranks(8).run(send_one_by_one, args, 20)
            for traffic in one_by_one
        )
        for args in (limited, free)
    ]
    assert most == [2, 3]  # of four nodes


def send_one_by_one(args: MoEArgs, num_tokens: int) -> list[Tensor]:
    ids_TK = route(args, num_tokens, dist.get_rank())
    dispatcher = make_dispatcher(("node_limited", 2), args.num_experts)
    x_1D = torch.zeros(1, 2, device=ids_TK.device)
    weights_1K = torch.ones(1, args.top_k, device=ids_TK.device)
    return [
        dispatcher.dispatch(x_1D, ids_1K, weights_1K)[2].traffic.cpu() for ids_1K in ids_TK.split(1)
    ]


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_v3s_routing_over_8_nodes(ranks, score_func):
    """The nodes that a token meets don't depend on the ranks of a node, so eight ranks on eight
    nodes stand for EP 64: 3.47 remote ones with 4 of 8 groups, 4.63 without, and 7 copies with one
    per expert in either case.
    """
    groups = {"num_expert_groups": 8, "num_limited_groups": 4}
    for limit, expected in ((groups, 3.47), ({}, 4.63)):
        args = MoEArgs(num_experts=256, top_k=8, score_func=score_func, **limit)
        results = ranks(8).run(send_tokens, ("node_limited", 1), args, 1500)
        met = sum(traffic[0, 2].item() for _, traffic in results) / (8 * 1500)
        assert met == pytest.approx(expected, rel=0.01)
        copies = sum(traffic[1, 2].item() for _, traffic in results) / (8 * 1500)
        assert copies == pytest.approx(7.0, rel=0.01)
    # Without the limit it is the chance that none of 8 experts drawn is among a node's 32.
    exact = 7 * (1 - math.comb(224, 8) / math.comb(256, 8))
    assert met == pytest.approx(exact, rel=0.01)


def loads_of_two_layers(way: Way) -> tuple[RoutingLoad, list[list[list[list[int]]]], int]:
    """Two micro-batches through two layers: the step's load, by micro-batch and layer this rank's
    routing, and what is left in the layers' buffers."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    layers, routings = [], []
    for top_k in (1, 3):
        torch.manual_seed(top_k)
        layers.append(MoE(MoEArgs(num_experts=8, top_k=top_k), dim=4, hidden_dim=4))
        layers[-1].init_weights(1.0)
        for name, param in list(layers[-1].experts.named_parameters()):
            local = torch.nn.Parameter(param.detach().chunk(world_size)[rank])
            setattr(layers[-1].experts, name, local)
        layers[-1].to(local_device())
        layers[-1].dispatcher = make_dispatcher(way, 8)
    torch.manual_seed(rank)
    for num_tokens in (rank, 5):
        for moe in layers:
            x_BSD = torch.randn(1, num_tokens, 4).to(local_device())
            record_load(moe, moe(x_BSD, return_load=True)[1])
            routings.append(moe.router(x_BSD[0], moe.expert_bias)[1].tolist())
    load = step_loads(layers, dist.group.WORLD)
    load = load._replace(traffic=load.traffic.cpu(), tokens_E=load.tokens_E.cpu())
    return load, routings, sum(moe.traffic.sum().item() for moe in layers)


@pytest.mark.parametrize("way", [("all_to_all", 2), ("node_limited", 2)])
def test_a_steps_traffic_is_summed_over_micro_batches_and_ranks_by_layer(ranks, way):
    results = ranks(4).run(loads_of_two_layers, way)
    by_batch = list(zip(*(routings for _, routings, _ in results), strict=True))
    for layer in range(2):
        expected = torch.zeros(2, 3, dtype=torch.int64)
        for routing in by_batch[layer::2]:
            for rank in range(4):
                expected += torch.tensor(expected_traffic(way, list(routing), 2, rank))
        for load, _, left in results:
            assert load.traffic[layer].tolist() == expected.tolist()
            assert left == 0, "the next step starts from zero"


def test_nothing_travels_where_all_experts_are_at_home():
    x_TD, ids_TK = torch.randn(5, 4), torch.tensor([[0, 1]] * 5)
    assert LocalDispatcher(4).dispatch(x_TD, ids_TK, torch.ones(5, 2))[2].traffic is None
    moe = MoE(MoEArgs(num_experts=4, top_k=2), dim=4, hidden_dim=4)
    moe.init_weights(0.1)
    record_load(moe, moe(x_TD.unsqueeze(0), return_load=True)[1])
    load = step_loads([moe])
    assert load.traffic.tolist() == [[[0, 0, 0]] * 2] and load.tokens_E.sum() == 10
