"""k steps, a new start, N - k steps = N steps, bit for bit; and every layout loads every other."""

from math import prod

import pytest
import torch

from tests.distributed_tests.resume_ranks import SAVES, losses_after_loading, train
from tests.tiny_run import as_toml

FSDP, DDP = {}, {"parallelism__data_parallel_shard_degree": 1}
EP = "parallelism__expert_parallel_degree"
NODES = "parallelism__expert_parallel_node_size"
REPLICATE = "parallelism__data_parallel_replicate_degree"
DISPATCH = "parallelism__expert_parallel_dispatch"
TP, CP = "parallelism__tensor_parallel_degree", "parallelism__context_parallel_degree"
ETP = "parallelism__expert_tensor_parallel_degree"
PP = "parallelism__pipeline_parallel_degree"
SCHEDULE = "parallelism__pipeline_parallel_schedule"
ASYNC = {"checkpoint__async_mode": "async"}
TWO_DATASETS = [{"name": n, "dataset": "sample", "weight": w} for n, w in (("one", 2), ("two", 1))]
BLEND = {
    "training__dataset": "c4_test",  # as it is unset
    "training__blend": as_toml(TWO_DATASETS),
}

# Name: processes, settings. STEPS in one go against CUT, and the rest by a new start. They are odd,
# so that an expert bias, whose steps are all as long, can't come back to zero.
STEPS, CUT = 5, 2
EXACT = {
    "one process": (1, {}),
    "FSDP 2": (2, {}),
    "FSDP 2, saved in the background": (2, ASYNC),
    "FSDP 2, loader workers": (2, {"training__dataset_num_workers": 1}),
    "FSDP 2, a blend": (2, BLEND),
    "EP 2 x FSDP 2": (4, {EP: 2}),
    "HSDP 2 x 2": (4, {REPLICATE: 2}),
    "CP 2, TP 2, EP 4": (4, {CP: 2, TP: 2, EP: 4}),
    # Experts on every stage, and a layer beside the last.
    "PP 2, EP 2": (
        4,
        {PP: 2, EP: 2, "model__args.n_dense_layers": 0, "model__args.n_mtp_layers": 1},
    ),
}


@pytest.mark.parametrize("layout", EXACT)
def test_a_run_in_two_parts_equals_a_run_in_one(ranks, layout, tmp_path):
    world_size, settings = EXACT[layout]
    pool, settings = ranks(world_size), settings | SAVES | {"checkpoint__interval": CUT}
    straight = pool.run(train, tmp_path / "straight", settings | {"training__steps": STEPS})
    # The learning rate falls over training.steps: the first part must not end, but be cut off.
    (tmp_path / "parts/checkpoint").mkdir(parents=True)
    begun = tmp_path / f"straight/checkpoint/step-{CUT}"
    begun.rename(tmp_path / f"parts/checkpoint/step-{CUT}")
    parts = pool.run(train, tmp_path / "parts", settings | {"training__steps": STEPS})
    for one, two in zip(straight, parts, strict=True):
        assert two["losses"] == one["losses"][CUT:]
        assert two["numbers"] == one["numbers"]
        assert two["state"].keys() == one["state"].keys()
        for name, value in one["state"].items():
            assert torch.equal(two["state"][name], value), name
        assert any("exp_avg" in name for name in one["state"])
        assert any(value.any() for name, value in one["state"].items() if "expert_bias" in name)


# ---------------------------------------------------------------------------------------------
# Other layouts
# ---------------------------------------------------------------------------------------------

# Add a row here for each new kind of parallelism. Each saves, and is loaded by the next one and by
# one process; all have the same global batch, so their losses are the same up to rounding.
BATCH = 8
LAYOUTS = {
    "one process": (1, {}),
    "DDP 2": (2, {REPLICATE: 2, **DDP}),
    "FSDP 4": (4, {}),
    "EP 2": (2, {EP: 2}),
    "HSDP 2 x 2": (4, {REPLICATE: 2}),
    "EP 4, nodes of 2": (4, {EP: 4, NODES: 2}),
    "FSDP 2": (2, {}),
    "EP 2 x FSDP 2": (4, {EP: 2, DISPATCH: "all_to_all"}),
    "EP 4 from DDP 4": (4, {EP: 4, REPLICATE: 4, **DDP}),
    "EP 2 x HSDP 2 x 2, nodes of 1": (4, {EP: 2, REPLICATE: 2, NODES: 1}),
    "DDP 4": (4, {REPLICATE: 4, **DDP}),
    "TP 2 x FSDP 2, split experts": (4, {TP: 2, ETP: 2}),
    "CP 2 x FSDP 2": (4, {CP: 2}),
    "CP 2, TP 2, EP 4": (4, {CP: 2, TP: 2, EP: 4}),
    "PP 2, EP 2": (4, {PP: 2, EP: 2}),
    "PP 2, two stages a rank": (2, {PP: 2, SCHEDULE: "DualPipeV"}),
}
NEXT = dict(zip(LAYOUTS, [*list(LAYOUTS)[1:], *list(LAYOUTS)[:1]], strict=True))


def run_of(world_size: int, settings: dict) -> dict:
    readers = world_size // prod(settings.get(degree, 1) for degree in (TP, CP, PP))
    size = {"training__local_batch_size": BATCH // readers}
    return settings | size | SAVES | {"checkpoint__interval": 2, "training__steps": 3}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """The folder and the losses of a run of a layout, trained once."""
    runs = {}

    def run(layout: str):
        if layout not in runs:
            world_size, settings = LAYOUTS[layout]
            folder = tmp_path_factory.mktemp("saved")
            result = ranks(world_size).run(train, folder, run_of(world_size, settings))[0]
            runs[layout] = (folder, result["losses"])
        return runs[layout]

    return run


@pytest.mark.parametrize(("source", "target"), NEXT.items())
def test_any_layout_goes_on_from_any_other(ranks, saved, source, target, tmp_path):
    folder, expected = saved(source)
    world_size, settings = LAYOUTS[target]
    loaded = ranks(world_size).run(
        losses_after_loading, folder, run_of(world_size, settings), 2, tmp_path
    )[0]
    assert len(loaded) == 1, "step 3 alone was left to do"
    assert loaded[0] == pytest.approx(expected[2], rel=1e-6)
