"""DDP = FSDP = HSDP = one process in loss, gradient norm, weights and expert bias."""

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.helpers import Ranks
from tests.reference.training import train_plainly
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.working_weights import WorkingWeights
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.trainer import Interval, Trainer

STEPS, SEQUENCES, SEQ_LEN = 3, 8, 16
LR, MAX_NORM, WEIGHT_DECAY = 2e-3, 0.5, 0.1
# Everything once: dense and MoE layers, compressed queries, groups, sigmoid with bias.
MODEL = {
    "n_layers": 2,
    "n_heads": 2,
    "dim": 32,
    "inter_dim": 48,
    "moe_inter_dim": 16,
    "vocab_size": 2048,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "init_std": 0.1,
}


def config_of(*options: str) -> JobConfig:
    model = [f"--model.args.{name}={value}" for name, value in MODEL.items()]
    fixed = [
        "--model.flavor=debugmodel_node_limited",
        f"--training.seq_len={SEQ_LEN}",
        f"--training.steps={STEPS}",
        f"--training.global_batch_size={SEQUENCES}",
        f"--training.max_norm={MAX_NORM}",
        f"--optimizer.lr={LR}",
        f"--optimizer.weight_decay={WEIGHT_DECAY}",
        "--lr_scheduler.warmup_steps=0",
        "--lr_scheduler.min_lr_factor=1",
        "--debug.seed=7",
    ]
    return ConfigManager().parse_args([*fixed, *model, *options])


def global_batches() -> list[tuple[Tensor, Tensor]]:
    """Random text whose sequences end in paddings of very different lengths."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for step in range(STEPS):
        tokens = torch.randint(0, 2048, (SEQUENCES, SEQ_LEN + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        for sequence in range(SEQUENCES):
            labels[sequence, SEQ_LEN - (sequence * (step + 1)) % SEQ_LEN :] = IGNORE_INDEX
        steps.append((tokens[:, :-1].contiguous(), labels))
    return steps


def train_on_this_rank(options: list[str], dump_folder: str) -> dict:
    """Run the trainer on this rank's share of the global batches."""
    trainer = Trainer(config_of(*options, f"--job.dump_folder={dump_folder}"))
    size = trainer.config.training.local_batch_size
    share = SEQUENCES // trainer.dims.dp_degree
    first = trainer.rank * share
    mine = [
        ({"input": tokens[i : i + size]}, labels[i : i + size])
        for tokens, labels in global_batches()
        for i in range(first, first + share, size)
    ]
    batches, results = iter(mine), []
    for _ in range(STEPS):
        trainer.step += 1
        results.append(trainer.train_step(batches, Interval()))
    state = {name: _whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    trainer.close()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "state": state,
    }


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def assert_trained_alike(result: dict, expected: dict) -> None:
    """Losses, norms and every tensor after the last step, the tensors by their norm: AdamW divides
    by |gradient|, so an element whose gradient is next to nothing moves by its rounding error."""
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert result["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        error = (result["state"][name] - tensor).norm().item()
        assert error <= 1e-5 * tensor.norm().item(), f"{name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def one_process() -> dict:
    args = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=MODEL, seq_len=SEQ_LEN)
    torch.manual_seed(7)
    model = DeepSeekV3Model(args)
    model.init_weights()
    losses, norms = train_plainly(
        model, global_batches(), lr=LR, max_norm=MAX_NORM, weight_decay=WEIGHT_DECAY
    )
    return {"losses": losses, "norms": norms, "state": model.state_dict()}


FP32 = "--training.mixed_precision_param=float32"
LAYOUTS = {
    "one process": (1, ["--training.local_batch_size=8"]),
    "one process, accumulation": (1, ["--training.local_batch_size=2"]),
    "FSDP 2": (2, ["--training.local_batch_size=4"]),
    "FSDP 2, accumulation": (2, ["--training.local_batch_size=1"]),
    "FSDP 2, weights kept, full recomputation": (
        2,
        [
            "--training.local_batch_size=4",
            "--parallelism.fsdp_reshard_after_forward=never",
            "--activation_checkpoint.mode=full",
        ],
    ),
    "FSDP 2, compiled": (
        2,
        [
            "--training.local_batch_size=4",
            "--compile.enable",
            "--compile.backend=aot_eager",
            "--activation_checkpoint.mode=full",
        ],
    ),
    "DDP 2": (
        2,
        [
            "--training.local_batch_size=4",
            "--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=1",
        ],
    ),
    "DDP 2, accumulation": (
        2,
        [
            "--training.local_batch_size=2",
            "--parallelism.data_parallel_replicate_degree=2",
            "--parallelism.data_parallel_shard_degree=1",
        ],
    ),
    "FSDP 4": (4, ["--training.local_batch_size=2"]),
    "HSDP 2 x 2": (
        4,
        ["--training.local_batch_size=2", "--parallelism.data_parallel_replicate_degree=2"],
    ),
    "HSDP 2 x 2, accumulation, recomputation by operation": (
        4,
        [
            "--training.local_batch_size=1",
            "--parallelism.data_parallel_replicate_degree=2",
            "--activation_checkpoint.mode=selective",
            "--activation_checkpoint.selective_ac_option=op",
        ],
    ),
    "DDP 4": (
        4,
        [
            "--training.local_batch_size=2",
            "--parallelism.data_parallel_replicate_degree=4",
            "--parallelism.data_parallel_shard_degree=1",
        ],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, layout, tmp_path) -> None:
    world_size, options = LAYOUTS[layout]
    options = [FP32, "--activation_checkpoint.mode=none", *options]
    pool: Ranks = ranks(world_size)
    for result in pool.run(train_on_this_rank, options, str(tmp_path)):
        assert_trained_alike(result, one_process)


def train_without_fused_weights(options: list[str], folder: str) -> dict:
    """Working weights, each a tensor of its own."""
    add = WorkingWeights._add

    def add_single(self, module, name, params, *others) -> None:
        if len(params) == 1:
            add(self, module, name, params, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkingWeights, "_add", add_single)
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
        together = ranks(2).run(train_on_this_rank, [*options, *layout], str(tmp_path))
        assert together[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert together[0]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert together[0]["losses"] == pytest.approx(fused["losses"], rel=5e-4)
        assert together[0]["norms"] == pytest.approx(fused["norms"], rel=2e-2)


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
