"""Experts on other ranks = experts here: loss, gradient norm, weights and bias of three steps."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed_tests.test_data_parallel import (
    FP32,
    SEQUENCES,
    assert_trained_alike,
    config_of,
    global_batches,
    one_process,  # noqa: F401 (a fixture)
    train_on_this_rank,
)
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.trainer import Trainer


def ep(degree: int, *more: str) -> list[str]:
    return [f"--parallelism.expert_parallel_degree={degree}", *more]


def nodes_of(size: int) -> str:
    return f"--parallelism.expert_parallel_node_size={size}"


ALL_TO_ALL = "--parallelism.expert_parallel_dispatch=all_to_all"
NODE_LIMITED = "--parallelism.expert_parallel_dispatch=node_limited"
REPLICATE = "--parallelism.data_parallel_replicate_degree="
DDP = "--parallelism.data_parallel_shard_degree=1"
SIZE = "--training.local_batch_size="
LAYOUTS = {
    "EP 2": (2, [*ep(2), SIZE + "4"]),
    "EP 2, nodes of 1": (2, [*ep(2, nodes_of(1)), SIZE + "4"]),
    "EP 2, DDP 2": (2, [*ep(2), REPLICATE + "2", DDP, SIZE + "2"]),
    "EP 2 x FSDP 2": (4, [*ep(2), SIZE + "2"]),
    "EP 2 x FSDP 2, node-limited on one node": (4, [*ep(2, NODE_LIMITED), SIZE + "2"]),
    "EP 4": (4, [*ep(4, ALL_TO_ALL), SIZE + "2"]),
    "EP 4, nodes of 2, accumulation": (4, [*ep(4, nodes_of(2)), SIZE + "1"]),
    "EP 4, nodes of 1": (4, [*ep(4, nodes_of(1)), SIZE + "2"]),
    "EP 2 x HSDP 2 x 2, recomputation": (
        4,
        [*ep(2, nodes_of(1)), REPLICATE + "2", SIZE + "2", "--activation_checkpoint.mode=full"],
    ),
    "EP 4 from DDP 4": (4, [*ep(4, nodes_of(2)), REPLICATE + "4", DDP, SIZE + "2"]),
    "EP 8": (8, [*ep(8, ALL_TO_ALL), SIZE + "1"]),
    "EP 8, nodes of 2": (8, [*ep(8, nodes_of(2)), SIZE + "1"]),
    "EP 4 x FSDP 2, nodes of 2": (8, [*ep(4, nodes_of(2)), SIZE + "1"]),
    "EP 2 x HSDP 2 x 4": (8, [*ep(2), REPLICATE + "2", SIZE + "1"]),
    "EP 4 from HSDP 4 x 2, nodes of 1": (8, [*ep(4, nodes_of(1)), REPLICATE + "4", SIZE + "1"]),
}
# Four experts on eight ranks: four ranks share two experts, each has a part of both.
SPLIT_INSIDE = [
    *ep(2),
    "--model.args.moe_args.num_experts=4",
    "--model.args.moe_args.num_expert_groups=2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, layout, tmp_path):  # noqa: F811
    world_size, options = LAYOUTS[layout]
    options = [FP32, "--activation_checkpoint.mode=none", *options]
    for result in ranks(world_size).run(train_on_this_rank, options, str(tmp_path)):
        assert_trained_alike(result, one_process)


def first_gradients(options: list[str], dump_folder: str) -> dict[str, Tensor]:
    """Of the first global batch, before clipping; whole tensors on every rank."""
    trainer = Trainer(config_of(FP32, *options, f"--job.dump_folder={dump_folder}"))
    tokens, labels = global_batches()[0]
    share = SEQUENCES // trainer.dims.dp_degree
    mine = slice(trainer.rank * share, (trainer.rank + 1) * share)
    trainer.forward_backward(
        ({"input": tokens[mine]}, labels[mine]), (labels != IGNORE_INDEX).sum()
    )
    gradients = {n: whole(p.grad) for n, p in trainer.model.named_parameters()}
    trainer.close()
    return gradients


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


@pytest.fixture(scope="module")
def gradients_of_one_process(ranks, tmp_path_factory) -> dict[str, Tensor]:
    return ranks(1).run(first_gradients, [SIZE + "8"], str(tmp_path_factory.mktemp("one")))[0]


@pytest.mark.parametrize(
    "layout",
    [
        "EP 2",
        "EP 2 x HSDP 2 x 2, recomputation",
        "EP 4, nodes of 1",
        "EP 4 from DDP 4",
        "EP 8",
        "EP 4 x FSDP 2, nodes of 2",
    ],
)
def test_every_gradient_is_that_of_one_process(ranks, gradients_of_one_process, layout, tmp_path):
    world_size, options = LAYOUTS[layout]
    for gradients in ranks(world_size).run(first_gradients, options, str(tmp_path)):
        assert gradients.keys() == gradients_of_one_process.keys()
        for name, expected in gradients_of_one_process.items():
            error = ((gradients[name] - expected).norm() / expected.norm()).item()
            assert error <= 1e-6, f"{name} is off by {error:.1e}"


# ---------------------------------------------------------------------------------------------
# Fewer experts than ranks
# ---------------------------------------------------------------------------------------------


def initial_weights(options: list[str], dump_folder: str) -> tuple[dict[str, Tensor], list[str]]:
    """As drawn, and which dims of the experts' stacks are split on this rank's own mesh."""
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
