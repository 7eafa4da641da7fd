"""The router chooses and weights as its slow twin does, and refuses impossible numbers."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.moe import route
from torchtitan.models.moe import MoEArgs, TokenChoiceTopKRouter
from torchtitan.models.moe import router as router_module
from torchtitan.models.moe.args import RoutingRule
from torchtitan.tools.errors import UserError

DIM, TOKENS = 6, 12
quick = settings(max_examples=60, deadline=None)


def make_router(args: MoEArgs, dim: int = DIM) -> TokenChoiceTopKRouter:
    return TokenChoiceTopKRouter.of(args.routing, dim=dim)


@st.composite
def routings(draw, *, grouped: bool = False) -> MoEArgs:
    group_score = draw(st.sampled_from(["max", "top2_sum"]))
    groups = draw(st.integers(1, 5))
    size = draw(st.integers(1 if group_score == "max" else 2, 5))
    limited = draw(st.integers(1, groups))
    has_groups = grouped or draw(st.booleans())
    reachable = (limited if has_groups else groups) * size
    return MoEArgs(
        num_experts=groups * size,
        top_k=draw(st.integers(1, reachable)),
        num_expert_groups=groups if has_groups else None,
        num_limited_groups=limited if has_groups else None,
        group_score_func=group_score,
        score_func=draw(st.sampled_from(["softmax", "sigmoid"])),
        route_norm=draw(st.booleans()),
        route_scale=draw(st.sampled_from([1.0, 2.5, 16.0])),
    )


# ---------------------------------------------------------------------------------------------
# The rule
# ---------------------------------------------------------------------------------------------

RULE = RoutingRule(num_experts=8, top_k=2, num_expert_groups=4, num_limited_groups=2)
CHANGED = {
    "num_experts": 16,
    "num_expert_groups": 2,
    "num_limited_groups": 3,
    "top_k": 3,
    "score_func": "softmax",
    "route_norm": True,
    "route_scale": 2.5,
    "group_score_func": "max",
    "_debug_force_load_balance": True,
}


def route_by(rule: RoutingRule) -> list[torch.Tensor]:
    """Weights and ids of the same random tokens, sorted by id."""
    torch.manual_seed(0)
    gate, x = torch.randn(16, DIM), torch.randn(64, DIM)
    router = TokenChoiceTopKRouter.of(rule, dim=DIM)
    router.gate.weight = torch.nn.Parameter(gate[: rule.num_experts])
    weights, ids, _ = router(x)
    order = ids.argsort(dim=1)
    return [weights.gather(1, order), ids.gather(1, order)]


def test_each_field_of_the_rule_has_a_change_below():
    assert list(CHANGED) == [field.name for field in dataclasses.fields(RoutingRule)]


@pytest.mark.parametrize("name", CHANGED)
def test_each_field_of_the_rule_changes_the_routing(name):
    before = route_by(RULE)
    assert all(map(torch.equal, route_by(RULE), before))
    after = route_by(dataclasses.replace(RULE, **{name: CHANGED[name]}))
    assert not all(map(torch.equal, after, before))


@pytest.mark.parametrize("name", CHANGED)
def test_each_field_of_the_rule_reaches_the_kernel(name, monkeypatch):
    """In the kernel's terms, as the width of the logits, or by leaving the kernel out."""
    seen = []

    def kernel(logits, bias, rule):
        seen.append((logits.size(1), rule))
        return torch.ones(64, rule.top_k), torch.zeros(64, rule.top_k, dtype=torch.int64)

    monkeypatch.setattr(router_module, "can_route", lambda *_: True)
    monkeypatch.setattr(router_module, "route", kernel)
    route_by(RULE)
    assert len(seen) == 1
    route_by(dataclasses.replace(RULE, **{name: CHANGED[name]}))
    assert len(seen) == 1 if name.startswith("_debug") else seen[1] != seen[0]


@quick
@given(args=routings())
def test_a_router_from_arguments_is_the_one_from_their_rule(args):
    rule = args.routing
    named = {field.name: getattr(args, field.name) for field in dataclasses.fields(rule)}
    router = TokenChoiceTopKRouter(dim=DIM, **named)
    assert router.rule == rule == TokenChoiceTopKRouter.of(rule, dim=DIM).rule
    assert (router.num_experts, router.top_k) == (args.num_experts, args.top_k)


# ---------------------------------------------------------------------------------------------
# Choice and weights
# ---------------------------------------------------------------------------------------------


@st.composite
def biases(draw, num_experts: int) -> torch.Tensor | None:
    """None, or random around a mean that may lie far below (or above) zero."""
    mean = draw(st.sampled_from([None, 0.0, -1.0, -20.0, 5.0]))
    if mean is None:
        return None
    spread = draw(st.sampled_from([0.01, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return mean + spread * torch.randn(num_experts, generator=generator)


@quick
@given(data=st.data(), args=routings(), seed=st.integers(0, 2**31))
def test_choice_and_weights_are_the_twins(data, args, seed):
    torch.manual_seed(seed)
    bias = data.draw(biases(args.num_experts))
    router, x = make_router(args).double(), torch.randn(TOKENS, DIM, dtype=torch.float64)
    weights, ids, counts = router(x, bias)
    expected = route(x, router.gate.weight, bias, args)
    for t in range(TOKENS):
        assert set(ids[t].tolist()) == set(expected[t])
        ours = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
        for expert, weight in expected[t].items():
            assert ours[expert] == pytest.approx(weight.item(), rel=1e-12)
    loads = [sum(e in choice for choice in expected) for e in range(args.num_experts)]
    assert counts.tolist() == loads


@quick
@given(data=st.data(), args=routings(grouped=True), seed=st.integers(0, 2**31))
def test_a_token_never_uses_more_groups_than_allowed(data, args, seed):
    torch.manual_seed(seed)
    # Far-apart bf16 logits saturate the scores, so that ties and exact zeros and ones occur too.
    x = (torch.randn(TOKENS, DIM) * 30).bfloat16()
    router = make_router(args).bfloat16()
    bias = data.draw(biases(args.num_experts))
    _, ids, _ = router(x, bias)
    groups = ids // (args.num_experts // args.num_expert_groups)
    assert all(len(set(row)) <= args.num_limited_groups for row in groups.tolist())
    assert all(len(set(row)) == args.top_k for row in ids.tolist())


@quick
@given(data=st.data(), args=routings(grouped=True))
def test_only_the_best_groups_keep_their_scores(data, args):
    # Few values, so that ties are common; below zero, so that masking with 0 would be found out.
    rows = st.lists(
        st.sampled_from([-9.0, -4.0, -2.5, -1.0]),
        min_size=args.num_experts,
        max_size=args.num_experts,
    )
    scores = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    limited = make_router(args)._get_node_limited_routing_scores(scores)
    G = args.num_expert_groups
    for before, after in zip(scores.view(-1, G, args.num_experts // G), limited, strict=True):
        after = after.view(G, -1)
        kept = [g for g in range(G) if torch.equal(after[g], before[g])]
        left_out = [g for g in range(G) if torch.isneginf(after[g]).all()]
        assert len(kept) == args.num_limited_groups and len(kept) + len(left_out) == G
        best = 1 if args.group_score_func == "max" else 2
        score = [sum(sorted(row.tolist(), reverse=True)[:best]) for row in before]
        assert min(score[g] for g in kept) >= max((score[g] for g in left_out), default=-1e9)


@quick
@given(args=routings(), seed=st.integers(0, 2**31))
def test_no_groups_is_one_group_is_plain_top_k(args, seed):
    torch.manual_seed(seed)
    sizes = {"dim": DIM, "num_experts": args.num_experts, "top_k": args.top_k}
    one = {"num_expert_groups": 1, "num_limited_groups": 1, "group_score_func": "max"}
    # fp64: nearly equal scores may not change places by rounding.
    x, bias = torch.randn(TOKENS, DIM, dtype=torch.float64), torch.randn(args.num_experts)
    plain = TokenChoiceTopKRouter(**sizes).double()
    grouped = TokenChoiceTopKRouter(**sizes, **one).double()
    grouped.load_state_dict(plain.state_dict())
    scores = (x @ plain.gate.weight.T).sigmoid()
    for result in (plain(x, bias), grouped(x, bias)):
        weights, ids, _ = result
        expected = (scores + bias).topk(args.top_k).indices
        assert torch.equal(ids.sort().values, expected.sort().values)
        torch.testing.assert_close(weights, scores.gather(1, ids))


def test_a_bias_changes_the_choice_but_never_the_weights():
    torch.manual_seed(0)
    router, x = TokenChoiceTopKRouter(dim=DIM, num_experts=8, top_k=2), torch.randn(TOKENS, DIM)
    bias = torch.zeros(8)
    bias[5] = -50.0
    bias[6] = 50.0
    _, free_ids, _ = router(x, None)
    weights, ids, _ = router(x, bias)
    assert (free_ids == 5).any() and not (ids == 5).any() and (ids == 6).any(dim=1).all()
    torch.testing.assert_close(weights, (x @ router.gate.weight.T).sigmoid().gather(1, ids))


def test_weights_pass_gradients_to_the_gate_but_the_choice_does_not():
    torch.manual_seed(0)
    args = MoEArgs(
        num_experts=8, top_k=3, num_expert_groups=4, num_limited_groups=2, route_norm=True
    )
    router = make_router(args).double()
    x = torch.randn(TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(TOKENS, 8, dtype=torch.float64)
    weights, ids, counts = router(x, None)
    assert weights.requires_grad and not ids.requires_grad and not counts.requires_grad
    (weights * mix.gather(1, ids)).sum().backward()
    x_twin = x.detach().clone().requires_grad_()
    gate = router.gate.weight.detach().clone().requires_grad_()
    choices = route(x_twin, gate, None, args)
    sum(w * mix[t, e] for t, row in enumerate(choices) for e, w in row.items()).backward()
    torch.testing.assert_close(x.grad, x_twin.grad)
    torch.testing.assert_close(router.gate.weight.grad, gate.grad)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_a_bf16_model_still_routes_in_fp32(score_func):
    torch.manual_seed(0)
    args = MoEArgs(num_experts=16, top_k=4, score_func=score_func, route_norm=True, route_scale=2.5)
    router, x = make_router(args, dim=64).bfloat16(), torch.randn(200, 64).bfloat16()
    weights, ids, _ = router(x, torch.zeros(16))
    assert weights.dtype == torch.float32
    logits = x.double() @ router.gate.weight.double().T
    scores = logits.sigmoid() if score_func == "sigmoid" else logits.softmax(dim=-1)
    best, best_ids = scores.topk(4)
    assert torch.equal(ids.sort().values, best_ids.sort().values)
    expected = scores.gather(1, ids) / best.sum(dim=1, keepdim=True) * 2.5
    # A gate product rounded to bf16 would be off by 4e-3, its scores in bf16 as well.
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-7)


def test_underflowed_scores_give_zero_weights_not_nan():
    router = TokenChoiceTopKRouter(dim=1, num_experts=4, top_k=2, route_norm=True)
    torch.nn.init.constant_(router.gate.weight, -200.0)  # sigmoid(-200) is 0 in fp32
    weights, _, _ = router(torch.ones(3, 1), None)
    assert torch.equal(weights, torch.zeros(3, 2))


WRONG = [
    (
        {"num_expert_groups": 4},
        "num_limited_groups is missing: with num_expert_groups (4) set, say how many groups a "
        "token may use, from 1 to 4.",
    ),
    (
        {"num_limited_groups": 2},
        "num_limited_groups (2) needs num_expert_groups: set it to a divisor of num_experts (8), "
        "or leave both out.",
    ),
    (
        {"num_expert_groups": 3, "num_limited_groups": 1},
        "num_expert_groups (3) must divide num_experts (8); the nearest that does is 2.",
    ),
    (
        {"num_expert_groups": 0, "num_limited_groups": 1},
        "num_expert_groups (0) must divide num_experts (8); the nearest that does is 1.",
    ),
    (
        {"num_expert_groups": 8, "num_limited_groups": 4},
        "num_expert_groups (8) leaves 1 of num_experts (8) in a group, but group_score_func "
        "'top2_sum' needs at least 2: use at most 4 groups, or group_score_func 'max'.",
    ),
    (
        {"num_expert_groups": 4, "num_limited_groups": 5},
        "num_limited_groups (5) must lie between 1 and num_expert_groups (4).",
    ),
    (
        {"num_expert_groups": 4, "num_limited_groups": 0},
        "num_limited_groups (0) must lie between 1 and num_expert_groups (4).",
    ),
    (
        {"num_expert_groups": 4, "num_limited_groups": 1},
        "top_k (3) is larger than the 2 experts of num_limited_groups (1) groups of 2: lower top_k "
        "or raise num_limited_groups.",
    ),
    ({"top_k": 9}, "top_k (9) must lie between 1 and num_experts (8)."),
    ({"top_k": 0}, "top_k (0) must lie between 1 and num_experts (8)."),
    ({"num_experts": 0}, "num_experts (0) must be 1 or more."),
    ({"score_func": "tanh"}, "score_func ('tanh') must be 'softmax' or 'sigmoid'."),
    ({"route_scale": 0.0}, "route_scale (0.0) must be above 0."),
    ({"group_score_func": "mean"}, "group_score_func ('mean') must be 'top2_sum' or 'max'."),
]


@pytest.mark.parametrize("fields, message", WRONG)
def test_impossible_routing_is_refused_with_fields_and_values(fields, message):
    fields = {"num_experts": 8, "top_k": 3} | fields
    for build in (MoEArgs, lambda **kwargs: TokenChoiceTopKRouter(dim=DIM, **kwargs)):
        with pytest.raises(ValueError) as caught:
            build(**fields)
        assert isinstance(caught.value, UserError) and str(caught.value) == message


def test_impossible_layer_numbers_are_refused():
    with pytest.raises(UserError, match=r"num_shared_experts \(-1\) must be 0"):
        MoEArgs(num_shared_experts=-1)
    with pytest.raises(UserError, match=r"load_balance_coeff \(-0.1\) must be 0 "):
        MoEArgs(load_balance_coeff=-0.1)


@quick
@given(args=routings(), rounds=st.integers(1, 3), extra=st.integers(0, 3))
def test_forced_routing_is_even_distinct_and_within_the_groups(args, rounds, extra):
    E, K = args.num_experts, args.top_k
    router = make_router(dataclasses.replace(args, _debug_force_load_balance=True))
    even = rounds * E
    weights, ids, counts = router(torch.randn(even + extra, DIM), None)
    assert torch.bincount(ids[:even].flatten(), minlength=E).tolist() == [rounds * K] * E
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=E))
    assert all(len(set(row)) == K for row in ids.tolist())
    if args.num_expert_groups is not None:
        groups = (ids // (E // args.num_expert_groups)).tolist()
        spread = min(args.num_limited_groups, K)  # as many groups as allowed: not all on one node
        assert all(len(set(row)) == spread for row in groups)


def test_forced_routing_still_weights_by_the_scores():
    torch.manual_seed(0)
    router = make_router(MoEArgs(num_experts=8, top_k=2, _debug_force_load_balance=True))
    x = torch.randn(TOKENS, DIM)
    weights, ids, _ = router(x, torch.full((8,), 3.0))
    torch.testing.assert_close(weights, (x @ router.gate.weight.T).sigmoid().gather(1, ids))
