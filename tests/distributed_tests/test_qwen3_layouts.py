"""The second family on several ranks = the plain model on one: loss, gradient norm, weights."""

import pytest
import torch

from tests.distributed_tests.test_expert_parallel import SIZE
from tests.distributed_tests.test_layouts import nodes_of
from tests.distributed_tests.training_ranks import (
    FP32,
    LR,
    MAX_NORM,
    SEQ_LEN,
    WEIGHT_DECAY,
    assert_trained_alike,
    global_batches,
    train_with,
    training_options,
)
from tests.reference.training import train_plainly
from torchtitan.config import ConfigManager
from torchtitan.models.qwen3 import Qwen3Model, qwen3_args

DDP = "--parallelism.data_parallel_shard_degree=1"
REPLICATE = "--parallelism.data_parallel_replicate_degree="


def ep(degree: int, *more: str) -> list[str]:
    return [f"--parallelism.expert_parallel_degree={degree}", *more]


MODEL = {
    "n_layers": 2,
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 12,
    "hidden_dim": 48,
    "init_std": 0.1,
}
EXPERTS = {"moe_inter_dim": 16, "moe_args": {"load_balance_coeff": 1e-3}}
FLAVORS = {"debugmodel": MODEL, "debugmodel_moe": {**MODEL, **EXPERTS}}
LAYOUTS = {
    "dense, FSDP 2": ("debugmodel", 2, [SIZE + "2", "--activation_checkpoint.mode=full"]),
    "dense, HSDP 2 x 2": ("debugmodel", 4, [SIZE + "2", REPLICATE + "2"]),
    "experts, DDP 2": ("debugmodel_moe", 2, [SIZE + "4", REPLICATE + "2", DDP]),
    "experts, EP 2 x FSDP 2, nodes of 1": ("debugmodel_moe", 4, [*ep(2, nodes_of(1)), SIZE + "2"]),
    "experts, EP 4, recomputation": (
        "debugmodel_moe",
        4,
        [*ep(4), SIZE + "1", "--activation_checkpoint.mode=full"],
    ),
}


def train_qwen3(flavor: str, options: list[str], dump_folder: str) -> dict:
    flat = {n: v for n, v in FLAVORS[flavor].items() if n != "moe_args"}
    flat |= {f"moe_args.{n}": v for n, v in FLAVORS[flavor].get("moe_args", {}).items()}
    model = ["--model.name=qwen3", f"--model.flavor={flavor}"]
    model += [f"--model.args.{name}={value}" for name, value in flat.items()]
    fixed = [*training_options(), FP32, "--activation_checkpoint.mode=none"]
    dump = f"--job.dump_folder={dump_folder}"
    return train_with(ConfigManager().parse_args([*fixed, *model, dump, *options]))


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict]:
    results = {}
    for flavor, changes in FLAVORS.items():
        torch.manual_seed(7)
        model = Qwen3Model(qwen3_args[flavor].for_run(overrides=changes, seq_len=SEQ_LEN))
        model.init_weights()
        losses, norms = train_plainly(
            model, global_batches(), lr=LR, max_norm=MAX_NORM, weight_decay=WEIGHT_DECAY
        )
        results[flavor] = {"losses": losses, "norms": norms, "state": model.state_dict()}
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, layout, tmp_path):
    flavor, world_size, options = LAYOUTS[layout]
    for result in ranks(world_size).run(train_qwen3, flavor, options, str(tmp_path)):
        assert_trained_alike(result, one_process[flavor])
