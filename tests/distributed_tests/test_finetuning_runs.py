"""Runs with adapters or frozen parameters: start, resume, exports, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_tests.resume_ranks import SAVES, options, train
from tests.distributed_tests.test_hf_runs import texts, tokenizer
from tests.scripts import script
from tests.tiny_run import as_toml, losses
from torchtitan.config import ConfigManager
from torchtitan.train import main
from torchtitan.trainer import Trainer

LORA = {"model__converters": '["lora"]', "lora__rank": 4, "lora__alpha": 6}
FROZEN = {"training__frozen_fqns": '["*.moe.router.*", "tok_embeddings.*", "layers.0.*"]'}
HEAD = {"training__trainable_fqns": '["output.*"]'}
BF16 = {"training__dtype": "bfloat16", "training__mixed_precision_param": "bfloat16"}
EP = "parallelism__expert_parallel_degree"
TP, PP = "parallelism__tensor_parallel_degree", "parallelism__pipeline_parallel_degree"
STEPS, CUT = 4, 2
EXACT = {
    "adapters, one process, bf16": (1, LORA | BF16),
    "adapters, EP 2, bf16": (2, LORA | BF16 | {EP: 2}),
    "adapters, EP 2 x FSDP 2": (4, LORA | {EP: 2, "ema__enable": True}),
    "adapters, PP 2, TP 2": (4, LORA | {PP: 2, TP: 2}),
    "frozen, FSDP 2": (2, FROZEN | {"ema__enable": True}),
    "only the head, PP 2": (2, HEAD | {PP: 2}),
}


@pytest.mark.parametrize("layout", EXACT)
def test_a_run_in_two_parts_equals_a_run_in_one(ranks, layout, tmp_path):
    world_size, settings = EXACT[layout]
    settings = settings | SAVES | {"checkpoint__interval": CUT, "training__steps": STEPS}
    pool = ranks(world_size)
    straight = pool.run(train, tmp_path / "straight", settings)
    (tmp_path / "parts/checkpoint").mkdir(parents=True)
    begun = tmp_path / f"straight/checkpoint/step-{CUT}"
    begun.rename(tmp_path / f"parts/checkpoint/step-{CUT}")
    parts = pool.run(train, tmp_path / "parts", settings)
    for one, two in zip(straight, parts, strict=True):
        assert two["losses"] == one["losses"][CUT:]
        assert two["state"].keys() == one["state"].keys()
        assert all(torch.equal(two["state"][name], value) for name, value in one["state"].items())


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run of all parameters: checkpoint/step-1, whole, and step-2, weights."""
    folder = tmp_path_factory.mktemp("base")
    settings = SAVES | {"checkpoint__interval": 1, "training__steps": 2, "debug__seed": 7}
    settings |= {"checkpoint__last_save_model_only": True}
    assert main(options(folder, settings)) == 0
    return folder


def trainer_of(folder: Path, settings: dict[str, Any]) -> Trainer:
    return Trainer(ConfigManager().parse_args(options(folder, settings)))


@pytest.mark.parametrize("what", [LORA, FROZEN, LORA | BF16], ids=["lora", "frozen", "bf16"])
def test_only_what_is_trained_has_optimizer_state(what, tmp_path):
    trainer = trainer_of(tmp_path, what | {"training__steps": 1, "debug__seed": 7})
    trainer.train()
    params = dict(trainer.model.named_parameters())
    state = trainer.optimizer.state
    trained = {name: p for name, p in params.items() if p.requires_grad}
    assert {id(p) for p in state} == {id(p) for p in trained.values()}
    held = sum(t.nbytes for s in state.values() for n, t in s.items() if n != "step")
    assert held == sum(8 * p.numel() for p in trained.values())
    assert all(p.grad is None for p in params.values() if not p.requires_grad)
    adapters = {name for name in params if "lora_" in name}
    assert not adapters or adapters == trained.keys()
    assert all(params[name].dtype == torch.float32 for name in adapters)
    trainer.close()


def test_the_first_loss_with_adapters_is_the_base_models(base, tmp_path):
    """To the bit, from a checkpoint; then the adapters are trained, not the base."""
    start = {
        "checkpoint__enable": True,
        "checkpoint__load_only": True,
        "checkpoint__initial_load_path": base / "checkpoint/step-1",
        "training__steps": 3,
        "debug__seed": 7,
    }
    assert main(options(tmp_path / "plain", start)) == 0
    assert main(options(tmp_path / "lora", start | LORA)) == 0
    plain, adapted = losses(tmp_path / "plain"), losses(tmp_path / "lora")
    assert adapted[0] == plain[0]
    assert adapted[1] != plain[1]


def test_a_speed_of_zero_leaves_the_bias_to_the_bit(tmp_path):
    held = {"model__args.moe_args.load_balance_coeff": 0, "training__steps": 2, "debug__seed": 7}
    trainer = trainer_of(tmp_path, FROZEN | held)
    biases = [moe.expert_bias for moe in trainer.moes.values()]
    for bias in biases:
        bias.copy_(torch.linspace(-1, 1, len(bias)))
        bias[0] = -0.0
    before = [bias.clone().view(torch.int32) for bias in biases]
    trainer.train()
    after = [bias.view(torch.int32) for bias in biases]
    assert biases and all(map(torch.equal, before, after))
    trainer.close()


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run_main(folder: Path, settings: dict[str, Any]) -> int:
    return main(options(folder, settings))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("layout", [(4, {EP: 2}), (4, {PP: 2, TP: 2})], ids=["EP", "PP, TP"])
def test_a_run_writes_what_its_checkpoint_converts_to(ranks, layout, merged, tmp_path):
    world_size, degrees = layout
    settings = LORA | degrees | {"checkpoint__enable": True, "debug__seed": 7}
    settings |= {"training__steps": 2, "lora__save_merged": merged}
    export = settings | {"checkpoint__last_save_in_hf": True}
    pool = ranks(world_size)
    assert pool.run(run_main, tmp_path / "hf", export) == [0] * world_size
    assert pool.run(run_main, tmp_path / "ours", settings) == [0] * world_size
    convert = script("checkpoint_conversion/convert_to_hf.py")
    source, assets = tmp_path / "ours/checkpoint/step-2", ["--assets", str(tokenizer())]
    told = [str(source), str(tmp_path / "to"), "--dtype", "float32", *assets]
    assert convert.main([*told, "--merged"] if merged else told) == 0
    expected, found = files(tmp_path / "hf/checkpoint/step-2-hf"), files(tmp_path / "to")
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"adapter_config.json"}:  # names the tokenizer's folder
        assert found[name] == expected[name], name
    if merged:
        greedy = ["--temperature", "0"]
        assert texts([str(source), *greedy]) == texts([str(tmp_path / "to"), *greedy])


def test_an_adapter_folder_goes_into_a_run(base, tmp_path):
    start = {
        "checkpoint__enable": True,
        "checkpoint__initial_load_path": base / "checkpoint/step-1",
        "training__steps": 2,
        "debug__seed": 7,
    } | LORA
    assert main(options(tmp_path / "a", start | {"checkpoint__last_save_in_hf": True})) == 0
    assert main(options(tmp_path / "b", start)) == 0
    again = start | {"checkpoint__load_only": True}
    folder = {"lora__initial_load_path": tmp_path / "a/checkpoint/step-2-hf"}
    assert main(options(tmp_path / "c", again | folder)) == 0
    whole = {"checkpoint__initial_load_path": tmp_path / "b/checkpoint/step-2"}
    bias = {"model__args.moe_args.load_balance_coeff": 0}
    assert main(options(tmp_path / "d", again | whole | bias)) == 0
    assert main(options(tmp_path / "e", again | folder | whole | bias)) == 0
    assert losses(tmp_path / "e") == losses(tmp_path / "d")  # the same adapters, from the folder
    assert losses(tmp_path / "c")[0] < losses(tmp_path / "a")[0]


OVERRIDE = {"lora__override": as_toml([{"fqns": ["*.wo"], "alpha": 1.0}])}
REFUSED = {
    "other rank": (LORA, LORA | {"lora__rank": 8}, r"lora.rank \(4 there, 8 here\)"),
    "other alpha": (LORA, LORA | {"lora__alpha": 8}, r"lora.alpha \(6.0 there, 8.0 here\)"),
    "other override": (LORA, LORA | OVERRIDE, "lora.override"),
    "no adapters here": (LORA, {}, "has adapters .* but this run has none"),
    "no adapters there": ({}, LORA, "has no adapters, but this run adds them"),
    "frozen here": ({}, FROZEN, "was trained there and is frozen here"),
    "frozen there": (FROZEN, {}, "is trained here and was frozen there"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_of_another_training_is_refused(name, tmp_path, capsys):
    first, second, sentence = REFUSED[name]
    common = SAVES | {"training__steps": 1, "debug__seed": 7}
    assert main(options(tmp_path, first | common)) == 0
    capsys.readouterr()
    assert main(options(tmp_path, second | common | {"training__steps": 2})) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
