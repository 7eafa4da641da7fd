"""Gathered tokens whose sizes stay on the device: steps that need more room, and CUDA graphs."""

import hashlib

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

from tests.distributed_tests.test_layouts import KEEP_WEIGHTS
from tests.distributed_tests.training_ranks import FP32, config_of
from torchtitan.ops.grouped_mm import local_part
from torchtitan.trainer import Trainer
from torchtitan.trainer.step_log import Interval

ALL_GATHER = "--parallelism.expert_parallel_dispatch=all_gather"
ALL_TO_ALL = "--parallelism.expert_parallel_dispatch=all_to_all"
NO_ROOM = "--parallelism.expert_parallel_capacity=1"  # some rank always gets more than the mean
ROOM = "--parallelism.expert_parallel_capacity=4"
needs_gpus = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two GPUs")


def run_on_this_rank(options: list[str], dump_folder: str, steps: int) -> dict:
    """options: may set another batch than 4 sequences, half of the step's."""
    config = config_of(
        f"--job.dump_folder={dump_folder}",
        "--parallelism.expert_parallel_degree=2",
        "--training.local_batch_size=4",
        *options,
    )
    trainer = Trainer(config)
    try:
        batches, results = iter(trainer.dataloader), []
        for _ in range(steps):
            trainer.step += 1
            results.append(trainer.train_step(batches, Interval()))
        graphed = trainer.graphed
        return {
            "losses": [result.loss for result in results],
            "norms": [result.grad_norm for result in results],
            "loads": [load.tolist() for load in results[0].loads.values()],
            "moments": digest_of_moments(trainer),
            "factor": trainer.capacity and trainer.capacity.factor,
            "recorded": graphed is not None
            and (graphed._whole_step.holds_grads or graphed._one_pass.holds_grads),
        }
    finally:
        trainer.close()


def digest_of_moments(trainer: Trainer) -> str:
    """Digest of what AdamW has kept of this rank's gradients."""
    leaves, _ = tree_flatten_with_path(trainer.optimizer.state_dict())
    moments = {str(name): value for name, value in leaves if "exp_avg" in str(name)}
    assert len(moments) > 20, "AdamW keeps two of each parameter"
    digest = hashlib.sha256()
    for name in sorted(moments):
        digest.update(local_part(moments[name]).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run(ranks, tmp_path, *options: str, steps: int) -> dict:
    return ranks(2).run(run_on_this_rank, list(options), str(tmp_path), steps)[0]


def test_a_step_without_room_is_the_exact_step_bit_for_bit(ranks, tmp_path):
    local = "--training.local_batch_size=2"  # two micro-batches: the first alone may have room
    roomy = run(ranks, tmp_path / "roomy", FP32, local, ALL_GATHER, ROOM, steps=1)
    redone = run(ranks, tmp_path / "redone", FP32, local, ALL_GATHER, NO_ROOM, steps=1)
    for name in ("losses", "norms", "loads", "moments"):
        assert redone[name] == roomy[name], name
    assert roomy["factor"] == 4 and redone["factor"] > 1.25, "the room has grown"
    exact = run(
        ranks, tmp_path / "exact", FP32, local, ALL_TO_ALL, steps=1
    )  # sums in another order
    assert exact["loads"] == redone["loads"] and exact["factor"] is None
    assert exact["losses"] + exact["norms"] == pytest.approx(
        redone["losses"] + redone["norms"], rel=1e-6
    )


def test_room_that_suffices_does_not_grow(ranks, tmp_path):
    assert run(ranks, tmp_path, FP32, ALL_GATHER, ROOM, steps=2)["factor"] == 4


# bf16, whose grouped GEMM wants multiples of 8.
GRAPHED = ("--model.args.dim=64", "--model.args.moe_inter_dim=32", ALL_GATHER)
GRAPH = "--compile.cuda_graph"


@needs_gpus
@pytest.mark.parametrize("local_batch_size", [4, 2], ids=["one pass", "accumulation"])
def test_200_replayed_steps_have_the_losses_of_the_run(ranks, tmp_path, local_batch_size):
    """Routing changes all the time; a replay must follow it."""
    options = (*GRAPHED, f"--training.local_batch_size={local_batch_size}")
    eager = run(ranks, tmp_path / "eager", *options, ROOM, steps=200)
    graph = run(ranks, tmp_path / "graph", *options, ROOM, GRAPH, steps=200)
    assert graph["recorded"] and not eager["recorded"]
    assert graph["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert eager["losses"][-1] < eager["losses"][0] - 1


@needs_gpus
@pytest.mark.parametrize("method", ["allgather", "alltoall"])
def test_replayed_steps_of_split_sequences_have_the_losses_of_the_run(ranks, tmp_path, method):
    split = "--parallelism.context_parallel_degree=2"
    rotate = f"--parallelism.context_parallel_rotate_method={method}"
    options = (*GRAPHED, split, rotate, "--training.local_batch_size=8")
    eager = run(ranks, tmp_path / "eager", *options, ROOM, steps=20)
    graph = run(ranks, tmp_path / "graph", *options, ROOM, GRAPH, steps=20)
    assert graph["recorded"] and not eager["recorded"]
    assert graph["losses"] == pytest.approx(eager["losses"], rel=1e-4)


DDP = (
    "--parallelism.data_parallel_replicate_degree=2",
    "--parallelism.data_parallel_shard_degree=1",
)


@needs_gpus
@pytest.mark.parametrize("local_batch_size", [4, 2], ids=["one pass", "accumulation"])
@pytest.mark.parametrize("how", [(KEEP_WEIGHTS,), (), DDP], ids=["kept", "freed", "replicas"])
def test_replayed_steps_of_shared_experts_have_the_losses_of_the_run(
    ranks, tmp_path, how, local_batch_size
):
    """Where steps have one pass, the graph gathers kept ones and sums over replicas; else that is
    done before the first pass and after the last one."""
    everywhere = ("--parallelism.expert_parallel_degree=1", *how)
    options = (*GRAPHED[:2], *everywhere, f"--training.local_batch_size={local_batch_size}")
    eager = run(ranks, tmp_path / "eager", *options, steps=40)
    graph = run(ranks, tmp_path / "graph", *options, GRAPH, steps=40)
    assert graph["recorded"] and not eager["recorded"]
    assert graph["losses"] == pytest.approx(eager["losses"], rel=1e-4)


@needs_gpus
def test_a_graph_without_room_is_redone_and_recorded_again(ranks, tmp_path):
    exact = run(ranks, tmp_path / "exact", *GRAPHED, ALL_TO_ALL, steps=20)
    graph = run(ranks, tmp_path / "graph", *GRAPHED, NO_ROOM, GRAPH, steps=20)
    assert graph["recorded"] and graph["factor"] > 1.25
    assert graph["losses"] == pytest.approx(exact["losses"], rel=1e-2)


@needs_gpus
def test_deterministic_replays_repeat_bit_for_bit(ranks, tmp_path):
    options = (*GRAPHED, GRAPH, "--debug.deterministic")
    first = run(ranks, tmp_path / "first", *options, steps=10)
    again = run(ranks, tmp_path / "again", *options, steps=10)
    assert first["recorded"] and first["losses"] == again["losses"]
