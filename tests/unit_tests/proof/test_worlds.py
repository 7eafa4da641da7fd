"""Smaller worlds: each pair of a layout's axes is in one of them, and none is larger than asked."""

from itertools import combinations

import pytest

from torchtitan.config import JobConfig, Parallelism
from torchtitan.proof import worlds
from torchtitan.proof.worlds import world_of, worlds_for
from torchtitan.tools.errors import UserError


def parallelism(**degrees: int | str) -> Parallelism:
    names = {"pp": "pipeline_parallel", "tp": "tensor_parallel", "cp": "context_parallel"}
    names |= {"ep": "expert_parallel", "etp": "expert_tensor_parallel"}
    names |= {"replicate": "data_parallel_replicate"}
    known = {f"{names[name]}_degree": n for name, n in degrees.items() if name in names}
    others = {name: value for name, value in degrees.items() if name not in names}
    return Parallelism(**known, **others)


LARGE = {
    "V3": (2048, {"pp": 16, "ep": 64}),
    "all": (1024, {"pp": 4, "cp": 4, "tp": 4, "ep": 16, "etp": 4, "replicate": 2}),
    "all with whole experts": (512, {"pp": 2, "cp": 4, "tp": 8, "ep": 64, "replicate": 2}),
    "EP over replicas": (64, {"replicate": 64, "ep": 16, "data_parallel_shard_degree": 1}),
}


@pytest.mark.parametrize("most", [8, 16])
@pytest.mark.parametrize("name", LARGE)
def test_each_pair_of_axes_is_kept_together(name, most):
    size, degrees = LARGE[name]
    settings = parallelism(**degrees)
    whole = world_of(JobConfig(parallelism=settings), size, 8)
    small, missing = worlds_for(whole, settings, most)
    pairs = {frozenset(pair) for pair in combinations(whole.axes, 2)}
    kept = {pair for pair in pairs if any(pair <= world.axes for world in small)}
    assert pairs - kept == {axes for axes in missing if len(axes) == 2}
    assert all(world.size <= most and world.axes <= whole.axes for world in small)
    if most == 16:
        assert not missing


def test_a_world_that_fits_stays_as_it_is():
    settings = parallelism(tp=4, ep=4)
    whole = world_of(JobConfig(parallelism=settings), 8, 8)
    assert worlds_for(whole, settings, 8) == ([whole], set())


def test_v3_keeps_experts_between_and_inside_nodes():
    settings = parallelism(pp=16, ep=64)
    whole = world_of(JobConfig(parallelism=settings), 2048, 8)
    ((world,), missing) = worlds_for(whole, settings, 16)
    assert missing == set() and world.axes == whole.axes
    assert world.degrees.ep == 4 and world.nodes == 2
    assert {worlds.EP_BETWEEN, worlds.EP_WITHIN, worlds.EXPERT_FSDP, worlds.PP} < world.axes


def test_a_schedule_from_a_file_keeps_its_degree_or_is_told_to_be_left_out():
    settings = parallelism(pp=32, pipeline_parallel_schedule_csv="x.csv")
    whole = world_of(JobConfig(parallelism=settings), 64, 8)
    small, missing = worlds_for(whole, settings, 16)
    assert all(world.degrees.pp == 1 for world in small)
    assert frozenset({worlds.PP, worlds.FSDP}) in missing


@pytest.mark.parametrize(
    ("degrees", "size"), [({}, 2), ({"pp": 4}, 8), ({"pp": 2, "ep": 6}, 12), ({"ep": 8}, 8)]
)
def test_the_fewest_processes_are_found(degrees, size):
    assert world_of(JobConfig(parallelism=parallelism(**degrees)), None, 8).size == size


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (0, "--world-size 0 must be a number of processes from 1 to 999,999"),
        (-3, "--world-size -3 must"),
        (1_000_000, "--world-size 1000000 must"),
        (6, "pipeline_parallel_degree = 4 does not divide the number of processes"),
    ],
)
def test_world_sizes_that_cannot_be_are_refused(size, sentence):
    with pytest.raises(UserError, match=sentence):
        world_of(JobConfig(parallelism=parallelism(pp=4)), size, 8)
