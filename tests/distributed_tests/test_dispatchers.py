"""A layer whose experts live on other ranks computes what it computes with all of them at home."""

from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.distributed_tests.expert_ranks import (
    Routing,
    Way,
    check_routing,
    make_dispatcher,
    ways,
)
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.tools.utils import local_device

# Multiples of 16 bytes in fp32, so that experts take the grouped GEMM.
DIM, HIDDEN, EXPERTS = 16, 8, 16
GROUPS = {"num_expert_groups": 8, "num_limited_groups": 4}


def layer_cases(world_size: int, dtype: torch.dtype) -> list[MoEArgs]:
    """Two complementary sets of options for each top-k, so that any two options meet with each of
    their values; on four CPU processes in fp32 both, elsewhere every second one."""
    options = list(product((False, True), repeat=3))
    cases = [
        MoEArgs(
            num_experts=EXPERTS,
            num_shared_experts=int(shared),
            top_k=top_k,
            score_before_experts=before,
            route_norm=top_k > 1,  # alone it makes the weight a constant, without a gradient
            **(GROUPS if in_groups else {}),
        )
        for top_k in range(1, 9)
        for in_groups, before, shared in (options[top_k % 4], options[7 - top_k % 4])
    ]
    if (world_size, dtype) == (4, torch.float32) and not torch.cuda.is_available():
        return cases
    # Every top-k, with the two sets in turn.
    return [cases[2 * i + (i // 4 + world_size // 4) % 2] for i in range(8)]


def make_layer(args: MoEArgs, dtype: torch.dtype) -> MoE:
    torch.manual_seed(3)
    moe = MoE(args, dim=DIM, hidden_dim=HIDDEN)
    moe.init_weights(0.3)
    moe.expert_bias.normal_(std=0.1)
    return moe.to(local_device(), dtype)


@cache
def tokens_by_rank(equally: bool, world_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Tokens by rank, none on rank 1 (or equally many), and what their outputs are multiplied
    with."""
    num_tokens = [0 if rank == 1 else 3 + rank * 5 % 7 for rank in range(world_size)]
    if equally:
        num_tokens = [5] * world_size
    generator = torch.Generator().manual_seed(4)
    both = torch.randn(sum(num_tokens), 2, DIM, dtype=dtype, generator=generator)
    return list(both.to(local_device()).split(num_tokens))


def equally_many(way: Way) -> bool:
    return way[0] == "all_gather"


def outputs_and_gradients(moe: MoE, tokens_T2D: Tensor) -> dict[str, Tensor]:
    x_TD, toward_TD = tokens_T2D.unbind(1)
    x_TD = x_TD.clone().requires_grad_()
    moe.zero_grad()
    out_TD = moe(x_TD.unsqueeze(0)).squeeze(0)
    (out_TD * toward_TD).sum().backward()
    gradients = {name: param.grad for name, param in moe.named_parameters()}
    results = {"out": out_TD.detach(), "x": x_TD.grad} | gradients
    return {name: value.cpu() for name, value in results.items()}


def layers_on_this_rank(ways: list[Way], dtype: torch.dtype) -> list[list[dict[str, Tensor]]]:
    """Run every case in every way: this rank's tokens through a layer that holds this rank's
    experts only. Results by case, by way."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = []
    for args in layer_cases(world_size, dtype):
        moe = make_layer(args, dtype)
        for name, param in list(moe.experts.named_parameters()):
            setattr(moe.experts, name, nn.Parameter(param.detach().chunk(world_size)[rank]))
        results.append([])
        for way in ways:
            moe.dispatcher = make_dispatcher(way, EXPERTS)
            tokens = tokens_by_rank(equally_many(way), world_size, dtype)
            results[-1].append(outputs_and_gradients(moe, tokens[rank]))
    return results


def assert_equal_one_process(ranks, world_size: int, ways: list[Way], dtype, rel: float) -> None:
    by_rank = ranks(world_size).run(layers_on_this_rank, ways, dtype)
    for args, parts in zip(layer_cases(world_size, dtype), zip(*by_rank, strict=True), strict=True):
        moe = make_layer(args, dtype)
        whole = {
            equally: outputs_and_gradients(
                moe, torch.cat(tokens_by_rank(equally, world_size, dtype))
            )
            for equally in set(map(equally_many, ways))
        }
        for way, of_ranks in zip(ways, zip(*parts, strict=True), strict=True):
            for name, expected in whole[equally_many(way)].items():
                values = [part[name] for part in of_ranks]
                spread = name in ("out", "x") or name.startswith("experts.")
                got = torch.cat(values) if spread else torch.stack(values).sum(dim=0)
                assert expected.norm() > 0, (name, args)
                error = ((got - expected).norm() / expected.norm()).item()
                assert error <= rel, f"{way}: {name} is off by {error:.1e} with {args}"


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_layer_with_experts_elsewhere_equals_one_process(ranks, world_size):
    in_ways = [*ways(world_size), ("all_gather", 2)]
    assert_equal_one_process(ranks, world_size, in_ways, torch.float32, rel=1e-6)


def test_layer_with_experts_elsewhere_equals_one_process_in_fp64(ranks):
    in_ways = [("all_to_all", 2), ("node_limited", 2), ("all_gather", 2)]
    assert_equal_one_process(ranks, 4, in_ways, torch.float64, rel=1e-12)


# ---------------------------------------------------------------------------------------------
# Routings made by hand
# ---------------------------------------------------------------------------------------------

# From the number of ranks to the experts of every token of every rank; 2 experts a rank.
PATTERNS = {
    "all tokens to one rank": lambda n: [[[2, 3], [3, 2]] for _ in range(n)],
    "all tokens to one expert": lambda n: [[[5 % n]] * 3 for _ in range(n)],
    "none to one rank": lambda n: [[[0, 1], [0, 2 * n - 1]] for _ in range(n)],
    "one token in all": lambda n: [[[0, 3, 1]] if r == n - 1 else [] for r in range(n)],
    "no token at all": lambda n: [[] for _ in range(n)],
    "zero tokens on every other rank": lambda n: [[[0, 3]] * (r % 2 * 4) for r in range(n)],
    "all experts of a token on one rank": lambda n: [
        [[2 * t + 1, 2 * t] for t in range(n)] for _ in range(n)
    ],
    "every expert of a token on another rank": lambda n: [
        [[(2 * i + t) % (2 * n) for i in range(n)] for t in range(3)] for _ in range(n)
    ],
    "every expert": lambda n: [[list(range(2 * n))] * 2 for _ in range(n)],
    "every token stays at home": lambda n: [[[2 * r, 2 * r + 1]] * 3 for r in range(n)],
    "every token goes far away": lambda n: [[[(2 * r + n) % (2 * n)]] * 3 for r in range(n)],
}


@pytest.mark.parametrize("world_size", [4, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(ranks, pattern, world_size):
    routing = PATTERNS[pattern](world_size)
    top_k = len(next((tokens[0] for tokens in routing if tokens), [0]))
    ranks(world_size).run(check_routing, ways(world_size), routing, top_k, 2)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Routing, int]:
    """Any, of a few tokens on each of four ranks with two experts each."""
    top_k = draw(st.integers(1, 8))
    token = st.permutations(range(8)).map(lambda experts: experts[:top_k])
    return [draw(st.lists(token, max_size=4)) for _ in range(4)], top_k


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(routings())
def test_any_pattern(ranks, routing_and_top_k):
    # No shrinking: a rank that fails takes its pool along, and a new one takes seconds.
    ranks(4).run(check_routing, ways(4), *routing_and_top_k, 2)


# ---------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------


def sums_of_bf16(way: Way) -> list[float]:
    """Two tokens of rank 0, whose experts return 256, 1 and 1: all on the last rank, or each on a
    rank of its own."""
    rank, experts_per_rank, device = dist.get_rank(), 4, local_device()
    dispatcher = make_dispatcher(way, experts_per_rank * dist.get_world_size())
    ids_TK = torch.tensor([[12, 13, 14], [0, 4, 8]], device=device)[: 2 if rank == 0 else 0]
    x_TD = torch.ones(len(ids_TK), 1, dtype=torch.bfloat16, device=device)
    weights_TK = torch.ones(ids_TK.shape, device=device)
    rows_RD, counts_L, record = dispatcher.dispatch(x_TD, ids_TK, weights_TK)
    outputs_L = torch.tensor([256.0 if rank in (0, 3) else 1.0, 1.0, 1.0, 1.0], device=device)
    rows_RD = rows_RD * outputs_L.repeat_interleave(counts_L).unsqueeze(1).to(torch.bfloat16)
    out_TD = dispatcher.combine(rows_RD, record)
    assert out_TD.dtype == torch.bfloat16
    return out_TD.flatten().tolist()


@pytest.mark.parametrize("way", [("all_to_all", 2), ("node_limited", 4)])
def test_partial_sums_of_bf16_rows_are_fp32(ranks, way):
    """256 + 1 is 256 in bf16: with one rounding a sum, all three make 258."""
    assert ranks(4).run(sums_of_bf16, way)[0] == [258.0, 258.0]
