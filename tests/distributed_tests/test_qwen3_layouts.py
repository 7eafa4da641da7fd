"""The second family on several ranks = the plain model on one: loss, gradient norm, weights."""

import pytest
import torch

from tests.distributed_tests.test_layouts import BY_HEADS, layout, nodes_of, pipeline
from tests.distributed_tests.test_tensor_parallel import watched, without_flex
from tests.distributed_tests.training_ranks import (
    LR,
    MAX_NORM,
    SEQ_LEN,
    SEQUENCES,
    WEIGHT_DECAY,
    assert_trained_alike,
    global_batches,
    train_with,
    training_options,
)
from tests.reference.training import train_plainly
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.models.qwen3 import Qwen3Model, qwen3_args
from torchtitan.tools.errors import UserError
from torchtitan.tools.utils import device_type
from torchtitan.trainer.preflight import check_config

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
DENSE = {
    "FSDP 2, recomputed": layout(2, ac="full", accumulation=2),
    "HSDP 2 x 2": layout(4, replicate=2),
    "TP 2": layout(2, tp=2),
    "CP 2, by heads": layout(2, BY_HEADS, cp=2),
    "PP 2": layout(2, pp=2),
}
EXPERTS_TOO = {
    "DDP 2": layout(2, replicate=2, shard=1),
    "EP 2, FSDP 2, nodes of 1": layout(4, nodes_of(1), ep=2),
    "EP 4, recomputed": layout(4, ep=4, ac="full", accumulation=2),
    "CP 2, TP 2, EP 4": layout(4, cp=2, tp=2, ep=4),
    "PP 2, CP 2, ZBVZeroBubble": layout(4, *pipeline("ZBVZeroBubble", 4), pp=2, cp=2),
    "PP 2, TP 2, split experts": layout(4, pp=2, tp=2, etp=2),
}
LAYOUTS = {f"dense, {name}": ("debugmodel", *row) for name, row in DENSE.items()}
LAYOUTS |= {f"experts, {name}": ("debugmodel_moe", *row) for name, row in EXPERTS_TOO.items()}


def qwen3_config(flavor: str, options: list[str], dump_folder: str) -> JobConfig:
    flat = {n: v for n, v in FLAVORS[flavor].items() if n != "moe_args"}
    flat |= {f"moe_args.{n}": v for n, v in FLAVORS[flavor].get("moe_args", {}).items()}
    model = ["--model.name=qwen3", f"--model.flavor={flavor}"]
    model += [f"--model.args.{name}={value}" for name, value in flat.items()]
    dump = f"--job.dump_folder={dump_folder}"
    return ConfigManager().parse_args([*training_options(), *model, dump, *options])


def train_qwen3(flavor: str, options: list[str], dump_folder: str) -> dict:
    return train_with(qwen3_config(flavor, options, dump_folder))


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict]:
    results = {}
    for flavor, changes in FLAVORS.items():
        torch.manual_seed(7)
        with torch.device(device_type()):  # a GPU draws other weights than a CPU
            model = Qwen3Model(qwen3_args[flavor].for_run(overrides=changes, seq_len=SEQ_LEN))
        model.init_weights()
        batches = [tuple(t.to(device_type()) for t in batch) for batch in global_batches()]
        losses, norms = train_plainly(
            model, batches, lr=LR, max_norm=MAX_NORM, weight_decay=WEIGHT_DECAY
        )
        results[flavor] = {"losses": losses, "norms": norms, "state": model.cpu().state_dict()}
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, layout, tmp_path):
    flavor, world_size, options = LAYOUTS[layout]
    for result in ranks(world_size).run(train_qwen3, flavor, options, str(tmp_path)):
        assert_trained_alike(result, one_process[flavor])


def watch_qwen3(options: list[str], dump_folder: str) -> tuple[set, list, list]:
    return watched(qwen3_config("debugmodel", options, dump_folder))


@without_flex
def test_context_parallelism_sends_keys_and_values_before_queries_share_them(ranks, tmp_path):
    channels = 2 * MODEL["n_kv_heads"] * MODEL["head_dim"]
    part = (SEQUENCES, SEQ_LEN // 2, channels)
    for _, gathered, _ in ranks(2).run(watch_qwen3, layout(2, cp=2)[1], str(tmp_path)):
        assert [s for s in gathered if s[:2] == part[:2]] == [part] * MODEL["n_layers"]
    options = layout(2, BY_HEADS, cp=2)[1]
    for _, _, exchanged in ranks(2).run(watch_qwen3, options, str(tmp_path)):
        heads = sorted(shape[-2] for shape in exchanged)  # of a rank and layer, there and back
        assert heads == sorted([1, 1, 2, 2] * 2 * MODEL["n_layers"])


REFUSALS = {
    "TP": (
        layout(4, tp=4),
        "parallelism.tensor_parallel_degree = 4 must divide model.args.n_kv_heads (2); set it to "
        "2.",
    ),
    "CP, by heads": (
        layout(4, BY_HEADS, cp=2, tp=2),
        'parallelism.context_parallel_rotate_method = "alltoall" distributes whole heads: '
        "parallelism.context_parallel_degree = 2 must divide model.args.n_kv_heads over "
        'parallelism.tensor_parallel_degree (1); use "allgather", which distributes positions '
        "only.",
    ),
    "EP": (
        layout(2, ep=2),
        "parallelism.expert_parallel_degree = 2, but this model has no experts; set it to 1.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_its_heads_do_not_allow_is_refused(name, monkeypatch, tmp_path):
    (world_size, options), sentence = REFUSALS[name]
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(UserError) as error:
        check_config(qwen3_config("debugmodel", options, str(tmp_path)))
    assert str(error.value) == sentence
