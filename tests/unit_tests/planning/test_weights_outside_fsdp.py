"""Plans of weights that several ranks share outside of FSDP: their state, bytes and sums."""

from dataclasses import replace

import pytest

from tests.unit_tests.planning.test_plan import DEBUG, check_arithmetic, plan, presets
from torchtitan.config import ConfigManager
from torchtitan.distributed.gathered_weight import parts_travel
from torchtitan.planning.advice import nearest_fit
from torchtitan.planning.hardware import find_hardware
from torchtitan.planning.plan import make_plan
from torchtitan.planning.sweep import estimate
from torchtitan.planning.traffic import (
    backward_gather_bytes,
    gather_bytes,
    reduce_bytes,
    replica_bytes,
)

NEVER = "--parallelism.fsdp_reshard_after_forward=never"
BF16_SUMS = "--training.mixed_precision_reduce=bfloat16"


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, [NEVER]),
        (2, [NEVER, BF16_SUMS]),
        (2, [NEVER, "--optimizer.implementation=foreach"]),
        (4, [NEVER, "--parallelism.expert_parallel_degree=2"]),
        (2, ["--parallelism.tensor_parallel_degree=2"]),
        (2, ["--model.args.vocab_size=2049"]),
        (1, ["--training.dtype=bfloat16", "--optimizer.implementation=foreach"]),
    ],
)
def test_arithmetic_knows_weights_outside_of_fsdp(world_size: int, options: list[str]) -> None:
    check_arithmetic(plan(*DEBUG, *options, world_size=world_size))


def test_a_sweep_keeps_traces_of_layouts_apart() -> None:
    """One layout's traces were taken for another, whose experts FSDP holds, or frees."""
    traced: dict = {}
    hardware = find_hardware("h200")
    replicas = "--parallelism.data_parallel_replicate_degree="
    layouts = [[], [NEVER], [f"{replicas}2", NEVER], [f"{replicas}2"], [f"{replicas}4"]]
    for options in layouts:
        config = ConfigManager().parse_args([*DEBUG, *options])
        after_others = estimate(config, 4, hardware, 1.0, traced).worst.peak.total
        assert after_others == estimate(config, 4, hardware, 1.0).worst.peak.total
        exact = plan(*DEBUG, *options, world_size=4).worst.peak.total
        assert after_others == pytest.approx(exact, rel=0.02)


def test_a_sweep_keeps_apart_how_gradients_travel() -> None:
    """On nodes of 8: a replica of 8 ranks sends parts in bf16, one of 16 is summed in fp32."""
    traced: dict = {}
    hardware = find_hardware("h200")
    for replicas in (4, 2):
        degree = f"--parallelism.data_parallel_replicate_degree={replicas}"
        options = ["--model.args.moe_args.num_experts=64", "--training.global_batch_size=256"]
        config = ConfigManager().parse_args([*DEBUG, *options, degree])
        after_others = estimate(config, 32, hardware, 1.0, traced).traffic
        assert after_others == estimate(config, 32, hardware, 1.0).traffic


def test_sums_in_bf16_send_half_the_bytes_and_hold_half() -> None:
    options = [*DEBUG, "--parallelism.data_parallel_replicate_degree=2"]
    whole = plan(*options, world_size=4)
    half = plan(*options, "--training.mixed_precision_reduce=bfloat16", world_size=4)
    for name, one in whole.traces.of_layer.items():
        other = half.traces.of_layer[name]
        assert replica_bytes(half.run, other).inside == replica_bytes(whole.run, one).inside / 2 > 0
        sums, half_sums = reduce_bytes(whole.run, one).inside, reduce_bytes(half.run, other).inside
        # Parts of those outside of FSDP travel in bf16 in either case.
        outside = one.outside.gathered * 2 / 2
        assert half_sums - outside == (sums - outside) / 2
        assert half_sums > 0
    assert half.traffic[0]["fsdp"].inside < whole.traffic[0]["fsdp"].inside
    assert half.worst.peak.total < whole.worst.peak.total


@pytest.mark.parametrize("passes", [1, 2])
def test_weights_outside_of_fsdp_travel_once_and_are_summed_in_bf16(passes: int) -> None:
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES, NEVER]
    found = plan(*options, f"--training.global_batch_size={8 * passes}", world_size=2)
    outside = 7 * 64 * 3 * 2048 * 1408 + 2 * 102_400 * 2048  # experts, embedding and head
    others = 4_594_374_656 - outside
    half = 0.5  # of two ranks
    expected = half * (2 * outside + passes * (2 * outside + (2 + 4) * others))
    assert found.traffic[0]["fsdp"].inside == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("how", ["never", "always"])
def test_weights_take_the_time_of_their_bytes_where_nothing_hides_them(how: str) -> None:
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    options += [f"--parallelism.fsdp_reshard_after_forward={how}"]
    options += ["--parallelism.expert_parallel_node_size=1", "--training.global_batch_size=24"]
    slow = replace(find_hardware("h200"), network_gb_s=0.01)
    found = make_plan(ConfigManager().parse_args(options), 2, slow)
    assert found.run.passes == 3, "kept experts are gathered in the first pass only"
    sent = found.traffic[0]["fsdp"].between
    assert found.time.parts["weights sent"] == pytest.approx(sent / 1e7, rel=0.01)


@pytest.mark.parametrize(
    "ranks, stride, node_size, travel",
    [(8, 1, 8, True), (4, 8, 8, True), (16, 1, 8, False), (4, 4, 8, False), (2, 8, 16, True)],
    ids=["a node", "one of each node", "two nodes", "two of each of two nodes", "two of a node"],
)
def test_parts_of_gradients_do_not_travel_where_nodes_have_several_ranks(
    ranks: int, stride: int, node_size: int, travel: bool
) -> None:
    assert parts_travel(ranks, stride, node_size) == travel


def test_between_nodes_of_several_ranks_weights_are_summed_in_fp32() -> None:
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    node = plan(*options, "--parallelism.expert_parallel_node_size=4", world_size=4)
    nodes = plan(*options, "--parallelism.expert_parallel_node_size=2", world_size=4)
    for name, one in node.traces.of_layer.items():
        other = nodes.traces.of_layer[name]
        parts = 2 * one.outside.gathered * 3 / 4
        under_fsdp = one.trained.gathered - one.outside.gathered
        once, split = reduce_bytes(node.run, one), reduce_bytes(nodes.run, other)
        assert once.inside == pytest.approx(parts + 4 * under_fsdp * 3 / 4), name
        all_in_fp32 = 4 * (one.trained.experts + one.trained.dense)
        assert (split.inside, split.between) == (all_in_fp32 / 2, all_in_fp32 / 4), name


def test_the_ends_are_gathered_once_a_pass() -> None:
    """The head stays from forward to backward pass, in which the embedding's table isn't read."""
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    found = plan(*options, "--parallelism.fsdp_reshard_after_forward=always", world_size=2)
    for name, one in found.traces.of_layer.items():
        again = backward_gather_bytes(found.run, one).inside
        whole = gather_bytes(found.run, one).inside
        assert again == (whole if name.isdecimal() else 0), name


def test_gathered_weights_are_given_up_first() -> None:
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    freed, kept = plan(*options, world_size=2), plan(*options, NEVER, world_size=2)
    between = (freed.worst.peak.total + kept.worst.peak.total) // 2
    assert kept.worst.peak.total - freed.worst.peak.total > 2 * 2**30
    small = replace(kept.hardware, memory_gib=kept.hardware.needed_gib(between))
    sentence = nearest_fit(replace(kept, hardware=small), 1.0)
    assert 'parallelism.fsdp_reshard_after_forward = "always"' in sentence
