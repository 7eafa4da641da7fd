"""Every layout trains like one process: loss, gradient norm, weights and bias of three steps.

One row of LAYOUTS is a layout; one of REFUSALS is a combination that can't run and its sentence.
"""

import pytest
import torch

from tests.distributed_tests.training_ranks import (
    FP32,
    SEQUENCES,
    assert_trained_alike,
    config_of,
    one_process,  # noqa: F401 (a fixture)
    train_on_this_rank,
)
from torchtitan.tools.errors import UserError
from torchtitan.trainer import check_config

DEGREES = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}


def layout(
    world_size: int, *more: str, accumulation: int = 1, ac: str = "none", **degrees: int
) -> tuple[int, list[str]]:
    """Processes, and the options of the run; the global batch is the same for all layouts."""
    not_data = [degrees.get(name, 1) for name in ("tp", "cp", "pp")]
    dp = world_size // (not_data[0] * not_data[1] * not_data[2])
    size = max(1, SEQUENCES // dp // accumulation)
    return world_size, [
        FP32,
        f"--training.local_batch_size={size}",
        f"--activation_checkpoint.mode={ac}",
        *(f"--parallelism.{DEGREES[name]}={degree}" for name, degree in degrees.items()),
        *more,
    ]


def nodes_of(size: int) -> str:
    return f"--parallelism.expert_parallel_node_size={size}"


ALL_TO_ALL = "--parallelism.expert_parallel_dispatch=all_to_all"
NODE_LIMITED = "--parallelism.expert_parallel_dispatch=node_limited"
KEEP_WEIGHTS = "--parallelism.fsdp_reshard_after_forward=never"
WHOLE_LOGITS = "--parallelism.disable_loss_parallel"
BY_HEADS = "--parallelism.context_parallel_rotate_method=alltoall"
BY_OPERATION = "--activation_checkpoint.selective_ac_option=op"
COMPILED = ("--compile.enable", "--compile.backend=aot_eager")

LAYOUTS = {
    # Data parallel
    "one process": layout(1),
    "one process, accumulation": layout(1, accumulation=4),
    "FSDP 2": layout(2),
    "FSDP 2, accumulation": layout(2, accumulation=4),
    "FSDP 2, weights kept, recomputed": layout(2, KEEP_WEIGHTS, ac="full"),
    "FSDP 2, compiled, recomputed": layout(2, *COMPILED, ac="full"),
    "DDP 2": layout(2, replicate=2, shard=1),
    "DDP 2, accumulation": layout(2, replicate=2, shard=1, accumulation=2),
    "FSDP 4": layout(4),
    "HSDP 2 x 2": layout(4, replicate=2),
    "HSDP 2 x 2, accumulation, by operation": layout(
        4, BY_OPERATION, replicate=2, accumulation=2, ac="selective"
    ),
    "DDP 4": layout(4, replicate=4, shard=1),
    # Experts
    "EP 2": layout(2, ep=2),
    "EP 2, nodes of 1": layout(2, nodes_of(1), ep=2),
    "EP 2, DDP 2": layout(2, ep=2, replicate=2, shard=1),
    "EP 2, FSDP 2": layout(4, ep=2),
    "EP 2, FSDP 2, node-limited on one node": layout(4, NODE_LIMITED, ep=2),
    "EP 4": layout(4, ALL_TO_ALL, ep=4),
    "EP 4, nodes of 2, accumulation": layout(4, nodes_of(2), ep=4, accumulation=2),
    "EP 4, nodes of 1": layout(4, nodes_of(1), ep=4),
    "EP 2, HSDP 2 x 2, recomputed": layout(4, nodes_of(1), ep=2, replicate=2, ac="full"),
    "EP 4 from DDP 4": layout(4, nodes_of(2), ep=4, replicate=4, shard=1),
    "EP 8": layout(8, ALL_TO_ALL, ep=8),
    "EP 8, nodes of 2": layout(8, nodes_of(2), ep=8),
    "EP 4, FSDP 2, nodes of 2": layout(8, nodes_of(2), ep=4),
    "EP 2, HSDP 2 x 4": layout(8, ep=2, replicate=2),
    "EP 4 from HSDP 4 x 2, nodes of 1": layout(8, nodes_of(1), ep=4, replicate=4),
    # Tensors
    "TP 2": layout(2, tp=2),
    "TP 2, accumulation, whole logits": layout(2, WHOLE_LOGITS, tp=2, accumulation=2),
    "TP 2, recomputed": layout(2, tp=2, ac="full"),
    "TP 2, compiled": layout(2, *COMPILED, tp=2),
    "TP 2, EP 2": layout(2, tp=2, ep=2),
    "TP 2, split experts": layout(2, tp=2, etp=2),
    "TP 4": layout(4, tp=4),
    "TP 2, FSDP 2": layout(4, tp=2),
    "TP 2, DDP 2": layout(4, tp=2, replicate=2, shard=1),
    "TP 2, FSDP 2, EP 4": layout(4, tp=2, ep=4),
    "TP 2, FSDP 2, EP 2, by operation": layout(4, BY_OPERATION, tp=2, ep=2, ac="selective"),
    "TP 2, FSDP 2, split experts": layout(4, tp=2, etp=2),
    "TP 2, EP 2 of split experts": layout(4, tp=2, ep=2, etp=2),
    # Context
    "CP 2": layout(2, cp=2),
    "CP 2, by heads": layout(2, BY_HEADS, cp=2),
    "CP 2, recomputed": layout(2, cp=2, ac="full"),
    "CP 2, compiled": layout(2, *COMPILED, cp=2),
    "CP 2, EP 2": layout(2, cp=2, ep=2),
    "CP 4": layout(4, cp=4),
    "CP 4, by heads": layout(4, BY_HEADS, cp=4),
    "CP 2, FSDP 2, accumulation": layout(4, cp=2, accumulation=2),
    "CP 2, DDP 2": layout(4, cp=2, replicate=2, shard=1),
    "CP 2, FSDP 2, EP 4": layout(4, cp=2, ep=4),
    "CP 2, TP 2": layout(4, cp=2, tp=2),
    "CP 2, TP 2, by heads": layout(4, BY_HEADS, cp=2, tp=2),
    # Three and more together
    "CP 2, TP 2, EP 4": layout(4, cp=2, tp=2, ep=4),
    "CP 2, TP 2, EP 2 of split experts": layout(4, cp=2, tp=2, ep=2, etp=2),
    "FSDP 2, CP 2, TP 2, EP 4, nodes of 2": layout(8, nodes_of(2), cp=2, tp=2, ep=4),
    "DDP 2, CP 2, TP 2, EP 2, recomputed": layout(
        8, cp=2, tp=2, ep=2, replicate=2, shard=1, ac="full"
    ),
    "HSDP 2 x 2, TP 2, EP 2 of split experts": layout(8, tp=2, ep=2, etp=2, replicate=2),
    "HSDP 2 x 2, CP 2, EP 8, by heads": layout(8, BY_HEADS, cp=2, ep=8, replicate=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, name, tmp_path):  # noqa: F811
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, options, str(tmp_path)):
        assert_trained_alike(result, one_process)


def test_a_combined_layout_repeats_bit_for_bit(ranks, tmp_path) -> None:
    options = LAYOUTS["CP 2, TP 2, EP 4"][1]
    first = ranks(4).run(train_on_this_rank, options, str(tmp_path))[0]
    again = ranks(4).run(train_on_this_rank, options, str(tmp_path))[0]
    assert first["losses"] == again["losses"] and first["norms"] == again["norms"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, again["state"][name]), name


# ---------------------------------------------------------------------------------------------
# What can't run says so
# ---------------------------------------------------------------------------------------------

REFUSALS = {
    "heads": (
        layout(3, "--training.seq_len=24", tp=3),
        "parallelism.tensor_parallel_degree = 3 must divide model.args.n_heads (4); the nearest "
        "that does is 4.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_run_is_refused_before_anything_starts(name, monkeypatch, tmp_path) -> None:
    (world_size, options), sentence = REFUSALS[name]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(UserError) as error:
        check_config(config_of(*options, f"--job.dump_folder={tmp_path}"))
    assert str(error.value) == sentence
