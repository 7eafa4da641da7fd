"""Experts beyond test_layouts.py: fewer of them than ranks."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed_tests.training_ranks import (
    FP32,
    assert_trained_alike,
    config_of,
    train_on_this_rank,
    whole,
)
from torchtitan.trainer import Trainer

SIZE = "--training.local_batch_size="
# Four experts on eight ranks: four ranks share two experts, each has a part of both.
SPLIT_INSIDE = [
    "--parallelism.expert_parallel_degree=2",
    "--model.args.moe_args.num_experts=4",
    "--model.args.moe_args.num_expert_groups=2",
]


def initial_weights(options: list[str], dump_folder: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights as drawn, and which dims of the experts' stacks are split on this rank's own mesh."""
    trainer = Trainer(config_of(*options, f"--job.dump_folder={dump_folder}"))
    state = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    w1 = next(iter(trainer.moes.values())).experts.w1
    placements = [str(p) for p in w1.placements] if isinstance(w1, DTensor) else []
    trainer.close()
    return state, placements


def test_fewer_experts_than_ranks_are_drawn_alike_and_split_inside(ranks, tmp_path):
    options = [*SPLIT_INSIDE, SIZE + "1"]
    alone = ["--parallelism.expert_parallel_degree=1"]
    expected, _ = ranks(1).run(initial_weights, [*options, *alone], str(tmp_path))[0]
    for state, placements in ranks(8).run(initial_weights, options, str(tmp_path)):
        assert placements == ["S(1)", "S(0)"], "hidden rows over FSDP, experts over EP"
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name


def test_fewer_experts_than_ranks_train_like_one_process(ranks, tmp_path):
    alone = ["--parallelism.expert_parallel_degree=1", SIZE + "8"]
    options = [FP32, *SPLIT_INSIDE]
    expected = ranks(1).run(train_on_this_rank, [*options, *alone], str(tmp_path))[0]
    results = ranks(8).run(train_on_this_rank, [*options, SIZE + "1"], str(tmp_path))
    for result in results:
        assert_trained_alike(result, expected)
