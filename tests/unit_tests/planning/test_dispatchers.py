"""Dispatchers compared between nodes, against arithmetic by hand and what was measured."""

from dataclasses import replace
from math import comb

import pytest

from tests.scripts import SCRIPTS, script
from torchtitan.config import ConfigManager
from torchtitan.planning.dispatchers import break_even
from torchtitan.planning.hardware import find_hardware
from torchtitan.planning.plan import Plan, make_plan
from torchtitan.planning.report import as_data, table
from torchtitan.planning.timing import StepTime
from torchtitan.planning.traffic import exchange_shares

MOONLIGHT = [
    "--model.flavor=Moonlight-16B-A3B",
    "--model.args.n_layers=2",
    "--training.seq_len=4096",
    "--training.local_batch_size=1",
    "--parallelism.expert_parallel_degree=16",
    "--activation_checkpoint.mode=none",
]
# Of Moonlight: 4,096 tokens choose 6 of 64 experts on 2 nodes of 8 ranks, 2,048 channels in bf16.
TOKENS, ROW = 4096, 4 * 2048 * 2 + 2 * (6 + 6) * 4
MEETS_RANK = 1 - comb(60, 6) / comb(64, 6)
MEETS_NODE = 1 - comb(32, 6) / comb(64, 6)


def compared(*options: str, gbits: tuple[float, ...] = (50, 400)) -> Plan:
    config = ConfigManager().parse_args([*MOONLIGHT, *options])
    networks = [find_hardware("h200").on_network(each) for each in gbits]
    return make_plan(config, 16, networks[0], networks=networks)


@pytest.fixture(scope="module")
def moonlight() -> Plan:
    return compared()


def rank_skew(plan: Plan) -> float:
    assert plan.traces.routing is not None
    return plan.traces.routing.rank_skew


def test_exchange_takes_as_long_as_its_copies_need_on_the_links(moonlight: Plan) -> None:
    """84 % of the network's speed, and 330 GB/s inside the node."""
    found = {(one.dispatcher, one.gbits): one.exchange_seconds for one in moonlight.dispatchers}
    assert len(found) == 4
    skew, bytes_a_copy = rank_skew(moonlight), TOKENS * ROW
    relayed = 2 * 7 * MEETS_RANK  # of two nodes' tokens, to the seven others
    for gbits in (50.0, 400.0):
        network = gbits * 0.84 / 8 * 1e9
        one_hop = 8 * MEETS_RANK * bytes_a_copy / network * skew
        assert found["all_to_all", gbits] == pytest.approx(one_hop, rel=0.01)
        two_hops = (MEETS_NODE / network + relayed / 330e9) * bytes_a_copy * skew + 3.1e-3
        assert found["node_limited", gbits] == pytest.approx(two_hops, rel=0.01)


def test_break_even_is_where_both_take_as_long(moonlight: Plan) -> None:
    assert moonlight.traces.routing is not None
    equal = break_even(moonlight.run, moonlight.traces.routing, moonlight.hardware)
    plan = compared(gbits=(equal / 2, equal, equal * 2))
    seconds = [one.exchange_seconds for one in plan.dispatchers]
    slower, same, faster = zip(seconds[:3], seconds[3:], strict=True)
    assert slower[1] < slower[0] and faster[1] > faster[0]
    assert same[0] == pytest.approx(same[1], rel=1e-6)
    assert f"less time below {equal:,.0f} Gbit/s" in table(plan, None)


def test_a_step_is_longer_by_the_exchange_of_its_layers(moonlight: Plan) -> None:
    """One of the two layers has experts; a slower network also delays weights."""
    by_rank, by_node = moonlight.dispatchers[0], moonlight.dispatchers[2]
    saved = by_rank.exchange_seconds - by_node.exchange_seconds
    packing = 0.02 * saved
    assert by_rank.step_seconds - by_node.step_seconds == pytest.approx(saved, abs=packing)


def test_the_planned_step_is_that_of_its_dispatcher_on_the_first_network(moonlight: Plan) -> None:
    """Between nodes "auto" is node_limited."""
    assert moonlight.time.seconds == moonlight.dispatchers[2].step_seconds
    other = compared("--parallelism.expert_parallel_dispatch=all_to_all")
    assert other.time.seconds == other.dispatchers[0].step_seconds
    assert as_data(other, None)["dispatchers"] == as_data(moonlight, None)["dispatchers"]


def test_a_recomputed_layer_sends_its_forward_half_twice() -> None:
    full = compared("--activation_checkpoint.mode=full")
    layer = full.traces.of_layer["1"]
    assert exchange_shares(full.traces, layer) == (0.5, 1.0)
    assert exchange_shares(full.traces, full.traces.of_layer["0"]) == (0.0, 0.0), "dense"


def test_second_hop_costs_what_it_cost_on_one_host() -> None:
    """16B, 8 layers, 16,384 tokens a GPU: 72,204 tokens/s with one hop, 65,610 with two."""
    options = [
        "--model.flavor=16B",
        "--model.args.n_layers=8",
        "--training.seq_len=4096",
        "--training.local_batch_size=4",
        "--parallelism.expert_parallel_degree=4",
        "--activation_checkpoint.mode=none",
        "--compile.enable",
        "--debug.moe_force_load_balance",
    ]
    hardware = find_hardware("h200")
    one_host = replace(hardware, network_gb_s=hardware.nvlink_gb_s)

    def time(*more: str) -> StepTime:
        return make_plan(ConfigManager().parse_args([*options, *more]), 4, one_host).time

    whole = time("--parallelism.expert_parallel_dispatch=all_to_all")
    played = time("--parallelism.expert_parallel_node_size=2")
    names = ("experts' exchange", "elementwise")
    longer = sum(played.parts[name] - whole.parts[name] for name in names)
    assert longer == pytest.approx(16_384 / 65_610 - 16_384 / 72_204, rel=0.02)


DEBUG = f"{SCRIPTS.parent}/train_configs/debug_model.toml"


@pytest.mark.parametrize(
    ("world_size", "speeds", "words"),
    [
        (16, ["0"], "--network-gbits 0 must be a number above 0"),
        (16, ["50", "-5"], "--network-gbits -5 must be a number above 0"),
        (16, ["nan"], "--network-gbits nan must be a number above 0"),
        (16, ["inf"], "--network-gbits inf must be a number above 0"),
        (16, ["fast"], "invalid float value: 'fast'"),
        (4, ["50"], "--network-gbits 50: all 4 GPUs are on one node"),
        (16, ["50", "100"], "the EP group of 1 is inside a node of 8"),
    ],
)
def test_a_network_that_cannot_be_gets_a_sentence(
    capsys, world_size: int, speeds: list[str], words: str
) -> None:
    command = [DEBUG, "--world-size", str(world_size), "--network-gbits", *speeds]
    try:
        code = script("plan.py").main(command)
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_one_speed_plans_weights_on_that_network() -> None:
    """Without experts between nodes there is no dispatcher to compare."""
    at = [compared("--parallelism.expert_parallel_degree=1", gbits=(n,)) for n in (50, 400)]
    assert not at[0].dispatchers
    sent = [plan.time.parts["weights sent"] for plan in at]
    assert sent[0] > sent[1]
    assert at[0].time.parts["experts"] == at[1].time.parts["experts"]
