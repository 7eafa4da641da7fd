"""What the start of a run says about groups, ranks and nodes, and when it warns."""

import dataclasses
import logging
import math
import re

import pytest
import torch

from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe.layout import expected_remote_nodes, log_expert_layout

V3 = MoEArgs(num_experts=256, top_k=8, num_expert_groups=8, num_limited_groups=4)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_expectation_for_v3_on_8_nodes(score_func):
    args = dataclasses.replace(V3, score_func=score_func)
    assert expected_remote_nodes(args, 8) == pytest.approx(3.47, rel=0.01)
    assert expected_remote_nodes(args, 8, limited=False) == pytest.approx(4.63, rel=0.01)


@pytest.mark.parametrize("nodes, num_experts, top_k", [(1, 8, 2), (2, 8, 3), (4, 64, 6), (8, 8, 4)])
def test_expectation_without_groups_is_the_hypergeometric_one(nodes, num_experts, top_k):
    per_node = num_experts // nodes
    missed = math.comb(num_experts - per_node, top_k) / math.comb(num_experts, top_k)
    args = MoEArgs(num_experts=num_experts, top_k=top_k)
    exact = (nodes - 1) * (1 - missed)
    assert expected_remote_nodes(args, nodes) == pytest.approx(exact, rel=0.02)


def test_expectation_with_a_group_for_each_token():
    """One group a token and a node: all experts are away, together, but for one token in n."""
    args = MoEArgs(num_experts=32, top_k=4, num_expert_groups=4, num_limited_groups=1)
    assert expected_remote_nodes(args, 4) == pytest.approx(3 / 4, rel=1e-6)


def test_expectation_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    expected_remote_nodes(V3, 8)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------------------------------
# Sentences
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    """Log lines for a layout: informative ones, warnings."""
    caplog.set_level(logging.INFO)

    def say(args: MoEArgs, ep: int, nodes: int) -> tuple[list[str], list[str]]:
        caplog.clear()
        log_expert_layout(args, ep=ep, nodes=nodes)
        by_level = {logging.INFO: [], logging.WARNING: []}
        for record in caplog.records:
            by_level[record.levelno].append(record.getMessage())
        return by_level[logging.INFO], by_level[logging.WARNING]

    return say


def grouped(num_experts: int, groups: int, limited: int, top_k: int = 2) -> MoEArgs:
    return MoEArgs(
        num_experts=num_experts, top_k=top_k, num_expert_groups=groups, num_limited_groups=limited
    )


def test_a_matching_layout_is_one_line_with_both_expectations(said):
    lines, warnings = said(V3, 64, 8)
    assert warnings == [] and len(lines) == 1
    found = re.fullmatch(
        r"Expert layout: 256 experts over 64 ranks on 8 nodes; a token meets ([\d.]+) remote nodes "
        r"\(([\d.]+) without the limit\), under random routing",
        lines[0],
    )
    assert float(found[1]) == pytest.approx(3.47, rel=0.01)
    assert float(found[2]) == pytest.approx(4.63, rel=0.01)


def test_without_groups_there_is_one_expectation_and_on_one_node_none(said):
    lines, warnings = said(MoEArgs(num_experts=8, top_k=3), 4, 2)
    assert "a token meets" in lines[0] and "without the limit" not in lines[0] and not warnings
    one_node = "Expert layout: 8 experts over 4 ranks on 1 node"
    assert said(grouped(8, 4, 2), 4, 1) == ([one_node], [])


def test_experts_at_home_have_no_layout(said):
    assert said(V3, 1, 1) == ([], [])


# Model, EP ranks, nodes: beginning of the warning, and the better layouts that it names.
MISMATCHES = {
    "straddling groups": (
        (grouped(24, 4, 2), 6, 6),
        "Groups of 6 experts straddle nodes of 4: a group limit doesn't bound a token's nodes; ",
        "use num_expert_groups = 6 and num_limited_groups = 3, or keep the groups and set "
        "expert_parallel_degree = 4, 4 nodes of 1",
    ),
    "straddling groups, large nodes": (
        (grouped(24, 3, 2), 4, 2),
        "Groups of 8 experts straddle nodes of 12: a group limit doesn't bound a token's nodes; ",
        "use num_expert_groups = 2 and num_limited_groups = 2, or keep the groups and set "
        "expert_parallel_degree = 6, 3 nodes of 2",
    ),
    "several groups a node": (
        (V3, 32, 4),
        "2 groups share a node: num_limited_groups limits the nodes best with one group a node; ",
        "use num_expert_groups = 4 and num_limited_groups = 2, or keep the groups and set "
        "expert_parallel_degree = 64, 8 nodes of 8",
    ),
    "several groups a node, many experts a token": (
        (grouped(16, 8, 1, top_k=2), 8, 8 // 2),
        "2 groups share a node: ",
        "use num_expert_groups = 4 and num_limited_groups = 1, or keep the groups and set "
        "expert_parallel_degree = 16, 8 nodes of 2",
    ),
    "a group on several nodes": (
        (grouped(32, 4, 2), 16, 8),
        "A group spans 2 nodes: num_limited_groups limits the nodes best with one group a node; ",
        "use num_expert_groups = 8 and num_limited_groups = 4, or keep the groups and set "
        "expert_parallel_degree = 8, 4 nodes of 2",
    ),
    "nodes of one expert": (
        (grouped(8, 4, 2), 8, 8),
        "A group spans 2 nodes: ",
        "use num_expert_groups = 8 and num_limited_groups = 4 (with group_score_func = 'max': a "
        "group has one expert), or keep the groups and set expert_parallel_degree = 4, 4 nodes "
        "of 1",
    ),
    "more ranks than experts would be needed": (
        (grouped(16, 8, 4), 16, 2),
        "4 groups share a node: ",
        "use num_expert_groups = 2 and num_limited_groups = 1",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_mismatch_is_a_warning_with_better_layouts(said, case):
    layout, beginning, advice = MISMATCHES[case]
    lines, warnings = said(*layout)
    assert len(lines) == len(warnings) == 1
    assert warnings[0].startswith(beginning) and warnings[0].endswith(f"; {advice}")


@pytest.mark.parametrize("case", MISMATCHES)
def test_who_follows_the_advice_is_not_warned_again(said, case):
    (args, ep, nodes), _, _ = MISMATCHES[case]
    (advice,) = said(args, ep, nodes)[1]
    groups, limited = map(int, re.findall(r"num_\w+_groups = (\d+)", advice))
    score = "max" if "'max'" in advice else args.group_score_func
    # Builds only where the rules of MoEArgs hold.
    better = dataclasses.replace(
        args, num_expert_groups=groups, num_limited_groups=limited, group_score_func=score
    )
    assert said(better, ep, nodes)[1] == []
    if found := re.search(r"expert_parallel_degree = (\d+), (\d+) nodes of (\d+)", advice):
        degree, more_nodes, ranks_per_node = map(int, found.groups())
        assert degree == more_nodes * ranks_per_node and args.num_experts % degree == 0
        assert said(args, degree, more_nodes)[1] == []
