"""comm.mode "fake_backend": a dry run of rank 0 of any layout, without another process."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.tiny_run import records, tiny
from torchtitan.config import ConfigManager
from torchtitan.distributed.dry_run import init_dry_run
from torchtitan.tools.errors import UserError
from torchtitan.trainer import Trainer

# In one process; torch 2.13 warns of the names that 2.11 has.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DRY_RUN = "--comm.mode=fake_backend"
FOUR_PARTS = (
    '--parallelism.module_fqns_per_model_part=[["tok_embeddings"],["layers.0"],["layers.1"],'
    '["norm","output"]]'
)


def degrees(**named: int) -> list[str]:
    return [f"--parallelism.{name}_parallel_degree={n}" for name, n in named.items()]


def nodes_of(size: int) -> str:
    return f"--parallelism.expert_parallel_node_size={size}"


def schedule(name: str) -> list[str]:
    return [f"--parallelism.pipeline_parallel_schedule={name}", FOUR_PARTS]


# Processes and options.
ROWS = {
    "EP 8": (8, degrees(expert=8)),
    "EP 8, nodes of 2": (64, [*degrees(expert=8), nodes_of(2)]),
    "EP 8, nodes of 1, HSDP": (
        64,
        [*degrees(expert=8), nodes_of(1), "--parallelism.data_parallel_replicate_degree=2"],
    ),
    "HSDP, EP, TP, split experts": (
        32,
        [
            *degrees(tensor=2, expert=4, expert_tensor=2),
            "--parallelism.data_parallel_replicate_degree=4",
            "--optimizer.name=Muon",
        ],
    ),
    "gathered experts": (
        8,
        [
            *degrees(expert=2),
            "--parallelism.fsdp_reshard_after_forward=never",
            "--training.mixed_precision_param=bfloat16",
        ],
    ),
    "TP 2 in bf16": (2, [*degrees(tensor=2), "--training.mixed_precision_param=bfloat16"]),
    "CP by heads": (
        16,
        [
            *degrees(context=2, expert=8),
            "--parallelism.context_parallel_rotate_method=alltoall",
        ],
    ),
    "CP, TP, multi-token prediction": (
        16,
        [*degrees(tensor=2, context=4, expert=8), "--model.args.n_mtp_layers=2"],
    ),
    "1F1B": (8, degrees(pipeline=2, expert=4)),
    "zero bubble V": (8, [*degrees(pipeline=2, expert=4), *schedule("ZBVZeroBubble")]),
    "DualPipeV, interleaved": (
        2048,
        [
            *degrees(pipeline=2, expert=8),
            *schedule("DualPipeV"),
            "--parallelism.pipeline_parallel_expert_parallel_overlap",
            "--model.args.n_mtp_layers=1",
        ],
    ),
    "V3's experts, 8 nodes of 8": (
        128,
        [
            *degrees(expert=64),
            nodes_of(8),
            "--model.args.moe_args.num_experts=256",
            "--model.args.moe_args.top_k=8",
            "--model.args.moe_args.num_expert_groups=8",
            "--model.args.moe_args.num_limited_groups=4",
            "--activation_checkpoint.mode=full",
            "--metrics.log_routing",
            "--model.args.moe_args.sequence_balance_coeff=1e-4",
        ],
    ),
    "validated, averaged": (
        8,
        [
            *degrees(expert=4, tensor=2),
            "--ema.enable",
            "--validation.enable",
            "--validation.dataset=sample",
            "--validation.seq_len=32",
            "--validation.freq=1",
            "--validation.steps=1",
        ],
    ),
}


def dry_run(monkeypatch, folder, world_size: int, options: list[str]) -> list[dict]:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    run = [*tiny(folder, training__steps=2), DRY_RUN, *options]
    trainer = Trainer(ConfigManager().parse_args(run))
    try:
        trainer.train()
    finally:
        trainer.close()
    return records(folder)


@pytest.mark.parametrize("name", ROWS)
def test_a_layout_has_a_dry_run(name, monkeypatch, tmp_path):
    if name in ("zero bubble V", "DualPipeV, interleaved") and torch.__version__ < "2.13":
        pytest.skip("schedules that split backward passes are refused")
    steps = dry_run(monkeypatch, tmp_path, *ROWS[name])
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step[key]) for step in steps for key in ("loss", "grad_norm"))


def test_the_group_gives_back_what_this_rank_has():
    init_dry_run(4)
    try:
        x = torch.arange(8.0)
        total, gathered = x.clone(), [torch.empty(8) for _ in range(4)]
        dist.all_reduce(total)
        dist.all_gather(gathered, x)
        part, largest = torch.empty(2), x.clone()
        dist.reduce_scatter_tensor(part, x.clone())
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        back = torch.empty(8)
        dist.all_to_all_single(back, x, [3, 1, 0, 4], [3, 1, 0, 4])
        objects = [None] * 4
        dist.all_gather_object(objects, {"a": 1})
    finally:
        dist.destroy_process_group()
    assert torch.equal(total, 4 * x) and torch.equal(part, 4 * x[:2]) and torch.equal(largest, x)
    assert all(torch.equal(each, x) for each in [*gathered, back])
    assert objects == [{"a": 1}] * 4


def test_each_rank_gets_as_many_rows_as_it_sends(monkeypatch, tmp_path):
    """Top-3 of 8 experts over 8 ranks: a row for each choice of all 8 ranks' tokens."""
    first, _ = dry_run(monkeypatch, tmp_path, *ROWS["EP 8"])
    sent = sum(first[f"rows_sent_{tier}"] for tier in ("self", "node", "remote"))
    assert sent == 8 * 4 * 32 * 3


def test_what_needs_a_trained_model_is_switched_off(monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    options = [
        "--checkpoint.enable",
        "--checkpoint.interval=1",
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.initial_load_path=/nowhere",
        "--checkpoint.last_save_in_hf",
        "--training.non_finite_loss=rewind",
        "--training.loss_spike=rewind",
    ]
    dry_run(monkeypatch, tmp_path, 8, [*options, *degrees(expert=8)])
    assert "checkpoints are off, nothing is loaded, saved or exported" in caplog.text
    assert "training.non_finite_loss is skip_step; training.loss_spike is warn" in caplog.text
    assert not (tmp_path / "checkpoint").exists()


def test_a_model_that_does_not_fit_is_refused_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100, 100))
    run = [*tiny(tmp_path), DRY_RUN]
    with pytest.raises(UserError, match=r"rank 0 of 2 needs .* GiB .* set NGPU or"):
        Trainer(ConfigManager().parse_args(run))


# Sizes of a toy with the layers, experts and groups of the 671B files.
TOY = {
    "model.hf_assets_path": "tests/assets/tokenizer",
    "model.args.vocab_size": 2048,
    "model.args.n_layers": 61,
    "model.args.q_lora_rank": 32,
    "model.args.n_heads": 32,
    "schedule.phase": "[]",  # a dry run has sequences of one length
    "training.fim_rate": 0,
    "training.steps": 1,
    "training.dataset_num_workers": 0,
    "checkpoint.enable": "false",  # the context files begin from the weights of the run before
    "activation_checkpoint.mode": "full",
    "metrics.enable_tensorboard": "false",
    "compile.enable": "false",
}


# World size; sequences of a step on each rank, and their length, less than in the file.
LAYOUTS_671B = {
    "deepseek_v3_671b": (2048, 16, 16),
    "deepseek_v3_671b_256xh200": (256, 2, 16),
    "deepseek_v3_671b_32k": (2048, 16, 128),
    "deepseek_v3_671b_128k": (2048, 16, 512),
}


@pytest.mark.parametrize("name", LAYOUTS_671B)
def test_the_layout_of_a_671b_file_has_a_dry_run(name, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    world_size, sequences, seq_len = LAYOUTS_671B[name]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    options = TOY | {
        "job.config_file": f"train_configs/{name}.toml",
        "training.local_batch_size": sequences,
        "training.global_batch_size": -1,
        "training.seq_len": seq_len,
    }
    (step,) = dry_run(monkeypatch, tmp_path, world_size, [f"--{k}={v}" for k, v in options.items()])
    assert math.isfinite(step["grad_norm"])
    assert "256 experts over 64 ranks on 8 nodes" in caplog.text
    assert "one copy of a token per destination node" in caplog.text
    rows = step["layer_rows_sent_remote"].values()
    assert rows and max(rows) <= 4 * step["tokens_seen"], "a token goes to 4 nodes at most"
