"""A plan against runs over gloo: the bytes that each rank holds, and the rows that it sends."""

from pathlib import Path

import pytest
import torch

from tests.distributed_tests.expert_ranks import Way, make_dispatcher
from tests.distributed_tests.test_layouts import KEEP_WEIGHTS
from tests.distributed_tests.training_ranks import config_of
from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe.router import TokenChoiceTopKRouter
from torchtitan.ops.grouped_mm import local_part
from torchtitan.planning.ranks import built_rank, plan_run
from torchtitan.planning.routing import route
from torchtitan.planning.state import State, bytes_of, state_of
from torchtitan.tools.utils import local_device
from torchtitan.trainer import Trainer

OPTIONS = (
    "--training.dataset=sample",
    "--training.steps=1",
    "--training.local_batch_size=2",
    "--training.mixed_precision_param=float32",
)
LORA = ['--model.converters=["lora"]', "--lora.rank=8"]
BF16 = "--training.mixed_precision_param=bfloat16"
LAYOUTS = {
    "FSDP 2": (2, []),
    "FSDP 2 x EP 2": (2, ["--parallelism.expert_parallel_degree=2"]),
    "FSDP 2, bf16 means": (2, ["--optimizer.state_dtype=bfloat16"]),
    "FSDP 2 x EP 2, bf16 copies": (
        2,
        ["--parallelism.expert_parallel_degree=2", "--training.mixed_precision_param=bfloat16"],
    ),
    "FSDP 2, gathered experts": (2, [KEEP_WEIGHTS, BF16]),
    "FSDP 2, gathered experts, bf16 sums": (
        2,
        [KEEP_WEIGHTS, BF16, "--training.mixed_precision_reduce=bfloat16"],
    ),
    "FSDP 2 x EP 2 x 2, gathered experts": (
        4,
        [KEEP_WEIGHTS, BF16, "--parallelism.expert_parallel_degree=2"],
    ),
    "TP 2": (2, ["--parallelism.tensor_parallel_degree=2"]),
    "PP 2": (2, ["--parallelism.pipeline_parallel_degree=2"]),
    "FSDP 2, frozen parts": (
        2,
        ['--training.frozen_fqns=["tok_embeddings.*", "layers.1.*", "layers.*.moe.router.*"]'],
    ),
    "FSDP 2, adapters": (2, LORA),
    "FSDP 2 x EP 2, adapters on bf16": (
        2,
        [
            *LORA,
            "--parallelism.expert_parallel_degree=2",
            "--training.dtype=bfloat16",
            "--training.mixed_precision_param=bfloat16",
        ],
    ),
    "FSDP 2, freed experts": (2, [BF16]),
    "HSDP 2 x 2 with EP 2, bf16 copies": (
        4,
        [
            BF16,
            "--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.expert_parallel_degree=2",
        ],
    ),
    "HSDP 2 x 2": (4, ["--parallelism.data_parallel_replicate_degree=2"]),
}


def held(folder: str, options: list[str]) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state after a step of this rank."""
    trainer = Trainer(config_of(*OPTIONS, f"--job.dump_folder={folder}", *options))
    try:
        trainer.train()
        params = list(trainer.model.parameters())
        state = trainer.optimizer.state.values()
        kept = [t for one in state for t in one.values() if isinstance(t, torch.Tensor)]
        grads = [p.grad for p in params if p.grad is not None]
        return bytes_of(params), bytes_of(grads), bytes_of(kept)
    finally:
        trainer.close()


def planned(world_size: int, rank: int, options: list[str]) -> State:
    run = plan_run(config_of(*OPTIONS, *options), world_size, gpus_per_node=8, device_type="cpu")
    with built_rank(run, rank) as built:
        return state_of(run, built)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_state_is_exactly_what_each_rank_holds(ranks, tmp_path: Path, layout: str) -> None:
    world_size, options = LAYOUTS[layout]
    runs = ranks(world_size).run(held, str(tmp_path), options)
    for rank, (parameters, gradients, optimizer) in enumerate(runs):
        state = planned(world_size, rank, options)
        assert state.parameters == parameters, rank
        assert state.gradients == gradients, rank
        assert state.optimizer == optimizer, rank


def send_evenly(way: Way, args: MoEArgs, num_tokens: int) -> list[list[int]]:
    """The meter's numbers of this rank, when every expert gets as many tokens."""
    router = TokenChoiceTopKRouter.of(args.routing, dim=8)
    device = local_device()
    ids_TK = router._balanced_choice(num_tokens, device)
    x_TD = torch.zeros(num_tokens, 2, device=device)
    weights_TK = torch.ones(ids_TK.shape, device=device)
    dispatcher = make_dispatcher(way, args.num_experts)
    return dispatcher.dispatch(x_TD, ids_TK, weights_TK)[2].traffic.tolist()


@pytest.mark.parametrize("groups", [{}, {"num_expert_groups": 4, "num_limited_groups": 2}])
@pytest.mark.parametrize("node_size", [2, 4])
def test_planned_rows_are_those_of_the_dispatchers_meter(ranks, node_size: int, groups) -> None:
    args = MoEArgs(num_experts=32, top_k=6, _debug_force_load_balance=True, **groups)
    routing = route(args, tokens=50, ep=4, nodes=4 // node_size)
    tiers = ("self", "node", "remote")
    for way, kind in (("rank", "all_to_all"), ("node", "node_limited")):
        metered = ranks(4).run(send_evenly, (kind, node_size), args, 50)
        sent, copies = torch.tensor(metered).sum(dim=0).tolist()
        assert [routing.rows[way, tier] for tier in tiers] == sent, way
        assert [routing.rows["expert", tier] for tier in tiers] == copies, way


def test_bytes_are_those_of_local_parts() -> None:
    assert bytes_of([local_part(torch.zeros(3, 5, dtype=torch.bfloat16))]) == 30
