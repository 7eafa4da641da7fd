"""Data parallelism beyond test_layouts.py: mixed precision, and what all ranks agree on."""

import pytest
import torch

from tests.distributed_tests.training_ranks import FP32, STEPS, config_of, train_on_this_rank
from torchtitan.components.optimizer import compute_weights
from torchtitan.trainer import Trainer
from torchtitan.trainer.step_log import Interval


def train_without_fused_weights(options: list[str], folder: str) -> dict:
    """Compute-dtype weights, each a tensor of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_weights, "joints", lambda module: [])
        return train_on_this_rank(options, folder)


def test_bf16_is_the_same_on_one_process_and_under_each_layout(ranks, tmp_path) -> None:
    """Mixed precision casts at the same places; what differs is the order of fp32 sums. One process
    also multiplies by fused weights, whose gradients of a shared input are rounded once, not twice.
    """
    options = ["--training.mixed_precision_param=bfloat16", "--activation_checkpoint.mode=none"]
    options.append("--training.local_batch_size=4")
    replicated = [
        "--parallelism.data_parallel_replicate_degree=2",
        "--parallelism.data_parallel_shard_degree=1",
    ]
    (alone,) = ranks(1).run(train_without_fused_weights, options, str(tmp_path))
    (fused,) = ranks(1).run(train_on_this_rank, options, str(tmp_path))
    for layout in ([], replicated):
        together = ranks(2).run(train_without_fused_weights, [*options, *layout], str(tmp_path))
        assert together[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert together[0]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert together[0]["losses"] == pytest.approx(fused["losses"], rel=5e-4)
        assert together[0]["norms"] == pytest.approx(fused["norms"], rel=2e-2)


def test_bf16_stays_close_where_partial_sums_travel_in_bf16(ranks, tmp_path) -> None:
    """TP adds up parts of activations in bf16, and CP and TP gradients of parts of a sequence."""
    options = ["--training.mixed_precision_param=bfloat16", "--activation_checkpoint.mode=none"]
    options += ["--training.local_batch_size=8"]
    alone = ranks(1).run(train_on_this_rank, options, str(tmp_path))[0]
    for degrees in (["tensor"], ["context"], ["tensor", "context"]):
        more = [f"--parallelism.{name}_parallel_degree=2" for name in degrees]
        together = ranks(2 ** len(degrees)).run(
            train_on_this_rank, [*options, *more], str(tmp_path)
        )
        assert together[0]["losses"] == pytest.approx(alone["losses"], rel=2e-3)
        assert together[0]["norms"] == pytest.approx(alone["norms"], rel=2e-2)


def test_all_ranks_report_the_same_numbers(ranks, tmp_path) -> None:
    options = [FP32, "--training.local_batch_size=2", "--activation_checkpoint.mode=none"]
    first, *others = ranks(4).run(train_on_this_rank, options, str(tmp_path))
    for other in others:
        assert other["losses"] == first["losses"] and other["norms"] == first["norms"]


def test_the_same_layout_repeats_bit_for_bit(ranks, tmp_path) -> None:
    options = [FP32, "--training.local_batch_size=2", "--activation_checkpoint.mode=none"]
    first = ranks(4).run(train_on_this_rank, options, str(tmp_path))[0]
    again = ranks(4).run(train_on_this_rank, options, str(tmp_path))[0]
    assert first["losses"] == again["losses"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, again["state"][name]), name


def train_on_text(options: list[str], dump_folder: str) -> list[float]:
    """The losses of a run as users start it, on the shipped text."""
    trainer = Trainer(config_of(*options, FP32, f"--job.dump_folder={dump_folder}"))
    batches, losses = iter(trainer.dataloader), []
    for _ in range(STEPS):
        trainer.step += 1
        losses.append(trainer.train_step(batches, Interval()).loss)
    trainer.close()
    return losses


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, ["--training.local_batch_size=2"]),
        (2, ["--training.local_batch_size=4"]),
        (4, ["--training.local_batch_size=1"]),
    ],
)
def test_every_layout_reads_the_same_text(ranks, world_size, options, tmp_path) -> None:
    """Ranks and accumulation take turns at one order of sequences."""
    alone = ranks(1).run(train_on_text, ["--training.local_batch_size=8"], str(tmp_path))[0]
    assert len(set(alone)) == STEPS
    for losses in ranks(world_size).run(train_on_text, options, str(tmp_path)):
        assert losses == pytest.approx(alone, rel=1e-6)
