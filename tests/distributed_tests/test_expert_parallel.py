"""Experts on other ranks = experts here: loss, gradient norm, weights and bias of three steps."""

import pytest
import torch

from tests.distributed_tests.test_data_parallel import (
    FP32,
    LR,
    one_process,  # noqa: F401 (a fixture)
    train_on_this_rank,
)


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
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, layout, tmp_path):  # noqa: F811
    world_size, options = LAYOUTS[layout]
    options = [FP32, "--activation_checkpoint.mode=none", *options]
    for result in ranks(world_size).run(train_on_this_rank, options, str(tmp_path)):
        assert result["losses"] == pytest.approx(one_process["losses"], rel=1e-6)
        assert result["norms"] == pytest.approx(one_process["norms"], rel=1e-5)
        for name, expected in one_process["state"].items():
            torch.testing.assert_close(
                result["state"][name], expected, rtol=1e-5, atol=LR * 1e-2, msg=name
            )
