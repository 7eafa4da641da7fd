"""Degrees of parallelism: which ones fit a number of processes, and the sentence where not."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtitan.config import Parallelism, resolve_degrees
from torchtitan.config.schema import build
from torchtitan.distributed import ParallelDims
from torchtitan.tools.errors import UserError


def parallelism(**values: int | None) -> Parallelism:
    """`tensor=2` is tensor_parallel_degree."""
    keys = {
        "replicate": "data_parallel_replicate_degree",
        "shard": "data_parallel_shard_degree",
        "tensor": "tensor_parallel_degree",
        "context": "context_parallel_degree",
        "pipeline": "pipeline_parallel_degree",
        "expert": "expert_parallel_degree",
        "expert_tensor": "expert_tensor_parallel_degree",
        "node_size": "expert_parallel_node_size",
    }
    return build({f"parallelism.{keys[name]}": value for name, value in values.items()}).parallelism


def refusal(world_size: int, **values: int) -> str:
    with pytest.raises(UserError) as error:
        resolve_degrees(parallelism(**values), world_size)
    return str(error.value)


@pytest.mark.parametrize(
    "replicate, shard, world_size, resolved",
    [
        (1, -1, 8, (1, 8)),
        (2, -1, 8, (2, 4)),
        (8, 1, 8, (8, 1)),
        (2, 4, 8, (2, 4)),
        (1, 1, 1, (1, 1)),
    ],
)
def test_dp_degrees_resolve(replicate, shard, world_size, resolved):
    degrees = resolve_degrees(Parallelism(replicate, shard), world_size)
    assert (degrees.dp_replicate, degrees.dp_shard) == resolved


@pytest.mark.parametrize(
    "replicate, shard, sentence",
    [
        (0, -1, "parallelism.data_parallel_replicate_degree = 0 must be 1 or more."),
        (
            1,
            0,
            "parallelism.data_parallel_shard_degree = 0 must be 1 or more, or -1 for all processes "
            "that the other degrees leave.",
        ),
        (
            3,
            -1,
            "parallelism.data_parallel_replicate_degree = 3 does not divide the number of "
            "processes (8); set it to 2 or 4.",
        ),
        (
            16,
            1,
            "parallelism.data_parallel_replicate_degree = 16 does not divide the number of "
            "processes (8); set it to 8.",
        ),
        (
            2,
            3,
            "parallelism.data_parallel_replicate_degree (2) x data_parallel_shard_degree (3) = 6, "
            "but the number of processes is 8; set data_parallel_shard_degree to 4 (or to -1, "
            "which means the rest), or start 6 processes.",
        ),
    ],
)
def test_degrees_that_do_not_fit_name_the_nearest_that_do(replicate, shard, sentence):
    assert refusal(
        8,
        replicate=replicate,
        shard=shard,
    ) == sentence  # fmt: skip


degree = st.integers(-1, 4)


@given(st.integers(1, 24), degree, degree, degree, degree, st.integers(-2, 9))
def test_degrees_resolve_exactly_when_they_can_cover_all_processes(
    world_size, pipeline, replicate, context, tensor, shard
):
    others = (pipeline, replicate, context, tensor)
    solutions = [
        s
        for s in range(1, world_size + 1)
        if min(others) >= 1 and prod(others) * s == world_size and shard in (s, -1)
    ]
    values = dict(zip(("pipeline", "replicate", "context", "tensor"), others, strict=True))
    try:
        resolved = resolve_degrees(parallelism(shard=shard, **values), world_size)
        assert [resolved.dp_shard] == solutions
    except UserError:
        assert solutions == []


@pytest.mark.parametrize(
    "values, sentence",
    [
        (
            dict(pipeline=2, tensor=3),
            "parallelism.tensor_parallel_degree = 3 does not divide the number of processes over "
            "pipeline_parallel_degree (2) (8); set it to 2 or 4.",
        ),
        (
            dict(pipeline=2, tensor=2, shard=3),
            "parallelism.pipeline_parallel_degree (2) x tensor_parallel_degree (2) x "
            "data_parallel_replicate_degree (1) x data_parallel_shard_degree (3) = 12, but the "
            "number of processes is 16; set data_parallel_shard_degree to 4 (or to -1, which means "
            "the rest), or start 12 processes.",
        ),
        (dict(context=0), "parallelism.context_parallel_degree = 0 must be 1 or more."),
        (
            dict(tensor=4, expert_tensor=2),
            "parallelism.expert_tensor_parallel_degree = 2 must be 1 or "
            "parallelism.tensor_parallel_degree (4); set it to 1 or 4.",
        ),
        (
            dict(pipeline=2, tensor=2, expert=3),
            "parallelism.expert_parallel_degree = 3 must divide the data-parallel shard x "
            "tensor-parallel degree (8), or be a multiple of it that divides the number of "
            "processes of a pipeline stage (8); set it to 2 or 4.",
        ),
        (
            dict(tensor=2, expert_tensor=2, expert=16),
            "parallelism.expert_parallel_degree = 16 must divide the data-parallel shard degree "
            "(8), or be a multiple of it that divides the number of processes over "
            "expert_tensor_parallel_degree (8); set it to 8.",
        ),
        (
            dict(tensor=2, expert_tensor=2, expert=4, node_size=1),
            "parallelism.expert_parallel_node_size = 1 must divide "
            "parallelism.expert_parallel_degree x expert_tensor_parallel_degree (8) or be a "
            "multiple of it; set it to 2.",
        ),
    ],
)
def test_sixteen_processes_refuse_what_does_not_fit_and_name_what_does(values, sentence):
    assert refusal(16, **values) == sentence


# By replicate degree, the expert-parallel degrees of 12 processes.
EXPERT_DEGREES = {
    1: {1, 2, 3, 4, 6, 12},
    2: {1, 2, 3, 6, 12},
    3: {1, 2, 4, 12},
    4: {1, 3, 6, 12},
    6: {1, 2, 4, 6, 12},
    12: {1, 2, 3, 4, 6, 12},
}


@pytest.mark.parametrize("replicate", EXPERT_DEGREES)
def test_expert_parallel_degree_takes_part_of_a_replica_or_whole_replicas(replicate):
    for degree in range(1, 17):
        values = dict(
            replicate=replicate,
            expert=degree,
        )
        if degree in EXPERT_DEGREES[replicate]:
            resolve_degrees(parallelism(**values), 12)
        else:
            sentence = refusal(12, **values)
            assert sentence.startswith(f"parallelism.expert_parallel_degree = {degree} ")


@pytest.mark.parametrize(
    "world_size, replicate, degree, sentence_end",
    [
        (8, 1, 3, "shard degree (8), {rule} (8); set it to 2 or 4."),
        (8, 1, 16, "shard degree (8), {rule} (8); set it to 8, or start a multiple of 16 {more}."),
        (8, 1, 0, "shard degree (8), {rule} (8); set it to 1."),
        (8, 2, 6, "shard degree (4), {rule} (8); set it to 4 or 8."),
        # 4 ranks would be two thirds of a replica, 9 one and a half.
        (36, 6, 4, "shard degree (6), {rule} (36); set it to 3 or 6."),
        (36, 6, 9, "shard degree (6), {rule} (36); set it to 6 or 12."),
        (1, 1, 2, "shard degree (1), {rule} (1); set it to 1, or start a multiple of 2 {more}."),
    ],
)
def test_expert_parallel_degree_that_does_not_fit_names_the_nearest_that_do(
    world_size, replicate, degree, sentence_end
):
    sentence = refusal(
        world_size,
        replicate=replicate,
        expert=degree,
    )
    rule = "or be a multiple of it that divides the number of processes"
    assert sentence == (
        f"parallelism.expert_parallel_degree = {degree} must divide the data-parallel "
        + sentence_end.format(rule=rule, more="processes")
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, None])
def test_node_size_may_split_an_expert_group_evenly_or_hold_several(size):
    resolve_degrees(parallelism(expert=4, node_size=size), 8)


@pytest.mark.parametrize(
    "size, nearest",
    [(3, "2 or 4"), (6, "4 or 8"), (5, "4 or 8"), (9, "8 or 12"), (0, "1"), (-2, "1")],
)
def test_node_size_that_does_not_fit_names_the_nearest_that_do(size, nearest):
    sentence = refusal(8, expert=4, node_size=size)
    assert sentence == (
        f"parallelism.expert_parallel_node_size = {size} must divide "
        f"parallelism.expert_parallel_degree (4) or be a multiple of it; set it to {nearest}."
    )


def dims_of(world_size: int, node_size: int, **values: int) -> ParallelDims:
    degrees = resolve_degrees(parallelism(**values), world_size)
    return ParallelDims(
        world_size=world_size, device_type="cpu", node_size=node_size, **degrees._asdict()
    )


def test_ranks_of_an_expert_group_by_node():
    assert dims_of(8, 2, expert=4).ep_groups.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert dims_of(8, 8, expert=4).ep_groups.tolist() == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    # Each expert is split over two neighbours, so a group takes every second rank.
    split = dims_of(8, 4, tensor=2, expert_tensor=2, expert=4)
    assert split.ep_groups.tolist() == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


def test_ranks_that_read_the_same_sequences():
    dims = dims_of(16, 16, pipeline=2, context=2, tensor=2)
    assert [dims.dp_rank(rank) for rank in range(16)] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert (dims.dp_degree, dims.fsdp, dims.expert_fsdp) == (2, 4, 8)
