"""The baseline dispatcher on several ranks = the local dispatcher with everybody's tokens."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.reference.plain_all_to_all import PlainAllToAllDispatcher
from torchtitan.models.moe.dispatcher import LocalDispatcher
from torchtitan.models.moe.moe import GroupedExperts

TOKENS, DIM, HIDDEN, EXPERTS, TOP_K = 12, 8, 6, 8, 2

ROUTINGS = ("random", "all to one rank", "none to one rank")


def whole_problem(routing: str, world_size: int) -> tuple[Tensor, Tensor, Tensor, GroupedExperts]:
    """Everybody's tokens, experts' ids and routing weights, and all experts, in fp64."""
    torch.manual_seed(3)
    x = torch.randn(world_size * TOKENS, DIM, dtype=torch.float64)
    scores = torch.rand(world_size * TOKENS, EXPERTS)
    if routing == "all to one rank":
        scores[:, -EXPERTS // world_size :] += 1
    elif routing == "none to one rank":
        scores[:, : EXPERTS // world_size] -= 1
    ids = scores.topk(TOP_K).indices
    weights = torch.rand(ids.shape, dtype=torch.float64)
    experts = GroupedExperts(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS).double()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    return x, ids, weights, experts


def run_layer(dispatcher, experts, x, ids, weights) -> dict[str, Tensor]:
    """Output and gradients of dispatch, experts, combine, for a gradient that is no constant."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    rows, counts, record = dispatcher.dispatch(x, ids, weights)
    out = dispatcher.combine(experts(rows, counts, record.weights_R), record)
    (out * out.detach().cos()).sum().backward()
    stacks = {name: weight.grad for name, weight in experts.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **stacks}


def compare_on_this_rank(routing: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    x, ids, weights, experts = whole_problem(routing, size)
    expected = run_layer(LocalDispatcher(EXPERTS), experts, x, ids, weights)

    tokens = slice(rank * TOKENS, (rank + 1) * TOKENS)
    held = slice(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
    mine = GroupedExperts(dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS // size).double()
    for name, weight in experts.state_dict().items():
        mine.get_parameter(name).data = weight[held].clone()
    plain = PlainAllToAllDispatcher(dist.group.WORLD, EXPERTS, ranks_per_node=1)
    got = run_layer(plain, mine, x[tokens], ids[tokens], weights[tokens])
    for name, value in got.items():
        part = held if name in mine.state_dict() else tokens
        torch.testing.assert_close(value, expected[name][part], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients_are_those_of_one_rank_with_all_experts(ranks, routing, world_size):
    ranks(world_size).run(compare_on_this_rank, routing)


def traffic_on_this_rank() -> list[list[int]]:
    """Token t of rank r chooses expert t; each of 4 ranks has one of 4 experts, 2 ranks a node."""
    ids = torch.arange(3).unsqueeze(1)
    plain = PlainAllToAllDispatcher(dist.group.WORLD, 4, ranks_per_node=2)
    *_, record = plain.dispatch(torch.zeros(3, 2), ids, torch.ones(3, 1))
    return record.traffic.tolist()


def test_traffic_counts_copies_by_distance(ranks):
    traffic = ranks(4).run(traffic_on_this_rank)
    expected = [[1, 1, 1], [1, 1, 1], [1, 0, 2], [0, 1, 2]]
    assert traffic == [[copies, copies] for copies in expected]
