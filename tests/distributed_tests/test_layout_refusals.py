"""Combinations of parallelisms that can't run are refused in a sentence, before anything starts.

One row of REFUSALS is a combination and its sentence.
"""

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.distributed_tests.test_layouts import (
    ALL_GATHER,
    ASYNC,
    BY_HEADS,
    COMPILED,
    DUAL,
    layout,
    pipeline,
)
from tests.distributed_tests.training_ranks import config_of
from torchtitan.tools.errors import UserError
from torchtitan.trainer.preflight import check_config

ONE_OPERATOR = (
    'parallelism.expert_parallel_dispatch = "all_gather" makes one operator of the experts, but '
)
AUTO = 'set it to "auto".'
REFUSALS = {
    "heads": (
        layout(3, "--training.seq_len=24", tp=3),
        "parallelism.tensor_parallel_degree = 3 must divide model.args.n_heads (4); set it to 2 or "
        "4.",
    ),
    "vocabulary": (
        layout(2, "--model.args.vocab_size=2049", tp=2),
        "parallelism.tensor_parallel_degree = 2 must divide model.args.vocab_size (2049); set it "
        "to 1 or 3.",
    ),
    "hidden channels": (
        layout(4, "--model.args.inter_dim=50", tp=4),
        "parallelism.tensor_parallel_degree = 4 must divide model.args.inter_dim (50); set it to 2 "
        "or 5.",
    ),
    "shared experts": (
        layout(4, "--model.args.moe_inter_dim=15", tp=4),
        "parallelism.tensor_parallel_degree = 4 must divide model.args.moe_inter_dim x "
        "model.args.moe_args.num_shared_experts (30); set it to 3 or 5.",
    ),
    "experts' channels": (
        layout(2, "--model.args.moe_inter_dim=15", tp=2, etp=2),
        "parallelism.expert_tensor_parallel_degree = 2 must divide model.args.moe_inter_dim (15); "
        "set it to 1 or 3.",
    ),
    "etp": (
        layout(4, tp=4, etp=2),
        "parallelism.expert_tensor_parallel_degree = 2 must be 1 or "
        "parallelism.tensor_parallel_degree (4); set it to 1 or 4.",
    ),
    "gathered, split experts": (
        layout(2, ALL_GATHER, tp=2, ep=1, etp=2),
        f"{ONE_OPERATOR}parallelism.expert_tensor_parallel_degree = 2 splits each of them; {AUTO}",
    ),
    "gathered, weighted inputs": (
        layout(2, ALL_GATHER, "--model.args.moe_args.score_before_experts=true", ep=2),
        f"{ONE_OPERATOR}model.args.moe_args.score_before_experts = true weights their inputs; "
        f"{AUTO}",
    ),
    "gathered, experts one by one": (
        layout(2, ALL_GATHER, "--model.args.moe_args.use_grouped_mm=false", ep=2),
        f"{ONE_OPERATOR}model.args.moe_args.use_grouped_mm = false computes one after the other; "
        f"{AUTO}",
    ),
    "sequence, TP": (
        layout(2, "--training.seq_len=15", tp=2),
        "training.seq_len = 15 must be a multiple of 2, so that parallelism.tensor_parallel_degree "
        "(2) splits it evenly; set it to 14 or 16.",
    ),
    "sequence, CP": (
        layout(2, "--training.seq_len=18", cp=2),
        "training.seq_len = 18 must be a multiple of 4, so that "
        "parallelism.context_parallel_degree (2) splits it evenly; set it to 16 or 20.",
    ),
    "sequence, both": (
        layout(8, "--training.seq_len=12", cp=2, tp=4),
        "training.seq_len = 12 must be a multiple of 8, so that "
        "parallelism.context_parallel_degree (2) and parallelism.tensor_parallel_degree (4) split "
        "it evenly; set it to 8 or 16.",
    ),
    "heads, CP": (
        layout(8, BY_HEADS, cp=8),
        'parallelism.context_parallel_rotate_method = "alltoall" distributes whole heads: '
        "parallelism.context_parallel_degree = 8 must divide model.args.n_heads (4); use "
        '"allgather", which distributes positions only.',
    ),
    "heads, CP and TP": (
        layout(8, BY_HEADS, cp=4, tp=2),
        'parallelism.context_parallel_rotate_method = "alltoall" distributes whole heads: '
        "parallelism.context_parallel_degree = 4 must divide model.args.n_heads over "
        'parallelism.tensor_parallel_degree (2); use "allgather", which distributes positions '
        "only.",
    ),
    "asynchronous without TP": (
        layout(2, ASYNC),
        "parallelism.enable_async_tensor_parallel = true needs parallelism.tensor_parallel_degree "
        "of 2 or more; set it to false.",
    ),
    "asynchronous on CPU": (
        layout(2, ASYNC, tp=2),
        "parallelism.enable_async_tensor_parallel = true needs CUDA GPUs, but this run is on cpu; "
        "set it to false.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_run_is_refused_before_anything_starts(name, monkeypatch, tmp_path) -> None:
    if name == "asynchronous on CPU" and torch.cuda.is_available():
        pytest.skip("needs a machine without GPUs")
    (world_size, options), sentence = REFUSALS[name]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(UserError) as error:
        check_config(config_of(*options, f"--job.dump_folder={tmp_path}"))
    assert str(error.value) == sentence


@pytest.mark.parametrize("compiled", [(), COMPILED], ids=["eager", "compiled"])
def test_split_backward_passes_need_torch_2_13(monkeypatch, tmp_path, compiled):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    options = [*compiled, f"--job.dump_folder={tmp_path}"]
    check_config(config_of(*layout(2, *pipeline("1F1B"), pp=2)[1], *options))
    with pytest.raises(UserError, match="'DualPipeV' splits .* torch 2.11.0.*torch 2.13 or later"):
        check_config(config_of(*layout(2, *DUAL, pp=2)[1], *options))
