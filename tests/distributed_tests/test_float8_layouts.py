"""Runs in FP8 (emulated) train like one process in FP8, but for rounding.

Scales of weights' gradients belong to 128 tokens of one rank, and of experts to 128 of their rows,
so that layouts round differently. FP8's own error is many times larger than what is allowed here.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.distributed_tests.test_layouts import (
    ALL_GATHER,
    COMPILED,
    NODE_LIMITED,
    layout,
    nodes_of,
    pipeline,
)
from tests.distributed_tests.training_ranks import (
    config_of,
    global_batches,
    train_on_this_rank,
    whole,
)
from torchtitan.distributed import float8_gather
from torchtitan.ops.block_fp8 import quantize_blocks
from torchtitan.trainer import Trainer

FLOAT8 = (
    '--model.converters=["float8"]',
    "--quantize.linear.float8.emulate",
    "--model.args.moe_inter_dim=128",
    "--model.args.q_lora_rank=32",
)
LAYOUTS = {
    "FSDP 2, recomputed": layout(2, ac="full"),
    "DDP 2, accumulation": layout(2, replicate=2, shard=1, accumulation=2),
    "EP 2, compiled": layout(2, *COMPILED, ep=2),
    "EP 2, gathered": layout(2, ALL_GATHER, ep=2),
    "TP 2, FSDP 2, EP 2": layout(4, tp=2, ep=2),
    "CP 2": layout(2, cp=2),
    "PP 2, InterleavedZeroBubble, EP 2": layout(
        4, *pipeline("InterleavedZeroBubble", 4), pp=2, ep=2
    ),
}


# Sizes of which each of two ranks of TP has whole blocks of 128: others have other scales.
OF_TP = tuple(
    f"--model.args.{name}={size}"
    for name, size in {
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "inter_dim": 256,
        "moe_inter_dim": 256,
    }.items()
)


def sizes(name: str) -> tuple[str, ...]:
    return OF_TP if "TP" in name else ()


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> Callable[..., dict]:
    """One process: of a layout's sizes, with and without FP8."""
    folder = str(tmp_path_factory.mktemp("alone"))

    @cache
    def run(*recipe: str) -> dict:
        return ranks(1).run(train_on_this_rank, [*layout(1)[1], *recipe], folder)[0]

    return run


def distance(result: dict, other: dict) -> float:
    """Euclidean distance of all weights after the last step."""
    pairs = ((result["state"][n], tensor) for n, tensor in other["state"].items())
    return sum((a - b).double().square().sum().item() for a, b in pairs) ** 0.5


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_like_one_process(ranks, alone, name, tmp_path):
    world_size, options = LAYOUTS[name]
    recipe = [*FLOAT8, *sizes(name)]
    plain, fp8 = alone(*recipe[1:]), alone(*recipe)
    for result in ranks(world_size).run(train_on_this_rank, [*options, *recipe], str(tmp_path)):
        assert result["losses"] == pytest.approx(fp8["losses"], rel=1e-3)
        assert result["norms"] == pytest.approx(fp8["norms"], rel=3e-2)
        assert result["losses"] != pytest.approx(plain["losses"], rel=1e-6)
        assert distance(result, fp8) < distance(plain, fp8)


@pytest.mark.parametrize("name", ["EP 2, compiled", "TP 2, FSDP 2, EP 2"])
def test_layouts_with_the_head_in_fp8_train_like_one_process(ranks, alone, name, tmp_path):
    recipe = [*FLOAT8, *sizes(name), "--quantize.linear.float8.head"]
    one = alone(*recipe)
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [*options, *recipe], str(tmp_path)):
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-3)
        assert result["norms"] == pytest.approx(one["norms"], rel=3e-2)
        assert result["losses"] != pytest.approx(alone(*recipe[:-1])["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("scales", "name"),
    [
        ("tensorwise", "FSDP 2, recomputed"),
        ("rowwise", "TP 2, FSDP 2, EP 2"),
        ("rowwise_with_gw_hp", "EP 2, compiled"),
    ],
)
def test_layouts_with_other_scales_train_like_one_process(ranks, alone, scales, name, tmp_path):
    """A scale is that of a rank's part, which shows most where one serves a whole tensor."""
    recipe = [*FLOAT8, *sizes(name), f"--quantize.linear.float8.recipe_name={scales}"]
    one = alone(*recipe)
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [*options, *recipe], str(tmp_path)):
        rel = 3e-3 if scales == "tensorwise" else 1e-3
        assert result["losses"] == pytest.approx(one["losses"], rel=rel)
        assert result["norms"] == pytest.approx(one["norms"], rel=3e-2)


def names_in_fp8(options: list[str], folder: str) -> list[str]:
    trainer = Trainer(config_of(*options, f"--job.dump_folder={folder}"))
    modules = trainer.model.named_modules()
    trainer.close()
    return [name for name, module in modules if getattr(module, "fp8", None) is not None]


def test_a_part_that_fp8_cannot_take_is_computed_without(ranks, tmp_path):
    """The dense layer has 48 hidden channels, a multiple of 16; a rank's 24 are none."""
    options = [*layout(2, tp=2)[1], *FLOAT8]
    dense = {f"layers.0.feed_forward.w{i}" for i in (1, 2, 3)}
    (alone,) = ranks(1).run(names_in_fp8, [*layout(1)[1], *FLOAT8], str(tmp_path))
    for split in ranks(2).run(names_in_fp8, options, str(tmp_path)):
        assert dense <= set(alone) and set(alone) - set(split) == dense
    ranks(2).run(train_on_this_rank, options, str(tmp_path))


WIDE = ("--model.args.inter_dim=256", "--model.args.v_head_dim=48")
GATHERS = {
    "FSDP 2, recomputed": (layout(2, ac="full"), "float32"),
    "FSDP 2, compiled": (layout(2, *COMPILED), "bfloat16"),
    "HSDP 2 x 2, EP 2": (layout(4, replicate=2, shard=2, ep=2, accumulation=2), "bfloat16"),
    "TP 2, FSDP 2": (layout(4, tp=2), "float32"),
    "PP 2, InterleavedZeroBubble": (
        layout(4, *pipeline("InterleavedZeroBubble", 4), pp=2),
        "float32",
    ),
}


def train_and_count(options: list[str], folder: str) -> dict:
    """Result of a run, with the shapes of the weights that have arrived in FP8."""
    shapes, arrived = set(), float8_gather._Gather.after

    def counted(self, outputs, *others, **how):
        shapes.add(tuple(outputs[0].shape))
        return arrived(self, outputs, *others, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float8_gather._Gather, "after", counted)
        return train_on_this_rank(options, folder) | {"arrived": shapes}


@pytest.mark.parametrize("name", GATHERS)
def test_weights_that_are_gathered_in_fp8_give_the_same_bits(ranks, name, tmp_path):
    """Shards have the compute dtype. Experts, wkv_b, the dense layer's gate and up travel in FP8;
    the rest has no whole blocks."""
    (world_size, options), dtype = GATHERS[name]
    options = [*options, *FLOAT8, *WIDE, f"--training.dtype={dtype}"]
    options.append(f"--training.mixed_precision_param={dtype}")
    pool = ranks(world_size)
    whole = pool.run(train_and_count, options, str(tmp_path))
    gathered = [*options, "--quantize.linear.float8.enable_fsdp_float8_all_gather"]
    for ours, twin in zip(pool.run(train_and_count, gathered, str(tmp_path)), whole, strict=True):
        assert ours["losses"] == twin["losses"] and ours["norms"] == twin["norms"]
        assert ours["arrived"] and not twin["arrived"]
        assert all(len(shape) == 3 or shape[0] == 256 for shape in ours["arrived"])
        for tensor, expected in zip(ours["state"].values(), twin["state"].values(), strict=True):
            assert torch.equal(tensor, expected)


def quantize_stack(weight: torch.Tensor) -> list[torch.Tensor]:
    """Values and scales of a matrix, or of a stack of them, by the rule of exports."""
    if weight.ndim == 2:
        return list(quantize_blocks(weight))
    return [torch.stack(each) for each in zip(*map(quantize_blocks, weight), strict=True)]


def weights_that_arrive(options: list[str], folder: str) -> tuple[int, int]:
    """Numbers of weights that arrive in FP8 in a forward pass, and of those among them that are the
    blocks of an fp32 parameter."""
    arrived, real = [], float8_gather._Gather.after

    def noted(self, outputs, *others, **how):
        arrived.append([part.cpu().clone() for part in outputs])
        return real(self, outputs, *others, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(float8_gather._Gather, "after", noted)
        trainer = Trainer(config_of(*options, f"--job.dump_folder={folder}"))
        masters = [whole(param.detach()) for param in trainer.model.parameters() if param.ndim > 1]
        tokens, labels = global_batches()[0]
        with torch.no_grad():
            trainer.loss_sum(({"input": tokens[:4]}, labels[:4]))
        trainer.close()
    assert all(master.dtype == torch.float32 for master in masters)
    blocks = [quantize_stack(master) for master in masters]
    exact = [any(all(map(torch.equal, each, parts)) for each in blocks) for parts in arrived]
    return len(arrived), sum(exact)


def test_what_arrives_of_fp32_shards_are_the_blocks_of_the_masters(ranks, tmp_path):
    """To the bit, the numbers of an export with --fp8. (Without the key, bf16 is quantised.)"""
    options = [*layout(2)[1], *FLOAT8, *WIDE, "--training.mixed_precision_param=bfloat16"]
    options.append("--quantize.linear.float8.enable_fsdp_float8_all_gather")
    for arrived, exact in ranks(2).run(weights_that_arrive, options, str(tmp_path)):
        assert arrived == exact >= 3


def test_adapters_beside_frozen_weights_in_fp8_train_like_one_process(ranks, tmp_path):
    adapted = [*FLOAT8[1:], '--model.converters=["lora", "float8"]', "--lora.rank=8"]
    adapted.append("--quantize.linear.float8.enable_fsdp_float8_all_gather")
    alone, *together = (
        result
        for size, options in (layout(1), layout(2, ALL_GATHER, ep=2))
        for result in ranks(size).run(train_on_this_rank, [*options, *adapted], str(tmp_path))
    )
    for result in together:
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        assert result["norms"] == pytest.approx(alone["norms"], rel=3e-2)
        for name, tensor in alone["state"].items():
            frozen = "lora" not in name and "expert_bias" not in name
            assert torch.equal(result["state"][name], tensor) or not frozen


DISPATCHES = {
    "all-to-all": layout(2, ep=2),
    "gathered": layout(2, ALL_GATHER, ep=2),
    "node-limited": layout(4, NODE_LIMITED, nodes_of(2), ep=4),
}


@pytest.mark.parametrize(
    "name, gradients", [*((name, "e4m3") for name in DISPATCHES), ("gathered", "e5m2")]
)
def test_tokens_that_travel_in_fp8_give_the_same_bits(ranks, name, gradients, tmp_path):
    """Experts would quantise them at their end: half the bytes, nothing lost."""
    world_size, options = DISPATCHES[name]
    options = [*options, *FLOAT8, f"--quantize.linear.float8.gradient_dtype={gradients}"]
    dispatched = [*options, "--quantize.grouped_mm.float8.dispatch"]
    pool = ranks(world_size)
    whole = pool.run(train_on_this_rank, options, str(tmp_path))
    for ours, twin in zip(
        pool.run(train_on_this_rank, dispatched, str(tmp_path)), whole, strict=True
    ):
        assert ours["losses"] == twin["losses"] and ours["norms"] == twin["norms"]
        for tensor, expected in zip(ours["state"].values(), twin["state"].values(), strict=True):
            assert torch.equal(tensor, expected)
