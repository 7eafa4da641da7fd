"""Phases that change the sequences: their length, number in a forward pass, and YaRN."""

import json
import re
from contextlib import closing
from pathlib import Path

import pytest

from tests.distributed_tests.test_layouts import COMPILED, ONE_BY_ONE, layout, pipeline
from tests.fault_tests.test_non_finite import poisoned_loss
from tests.tiny_run import as_option, losses, records, tiny
from torchtitan.config import ConfigManager
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.tools.errors import UserError
from torchtitan.train import main
from torchtitan.trainer import Trainer, forward_backward
from torchtitan.trainer.preflight import check_config

# 8 sequences of 32 tokens a step, then 4 of 64 with YaRN, then 8 of 16 without.
PHASES = [
    {"tokens": 512},
    {"tokens": 512, "seq_len": 64, "batch_size": 4, "local_batch_size": 2, "yarn": "on"},
    {"tokens": 256, "seq_len": 16, "batch_size": 8, "local_batch_size": 4, "yarn": "off"},
]
STEPS = 6
# Lengths on both sides of what the model was trained on; 4 heads, for tensor parallelism.
MODEL = {
    "model.args.original_seq_len": 32,
    "model.args.rope_factor": 4,
    "model.args.n_heads": 4,
    "training.global_batch_size": 8,
    "training.steps": STEPS,
}
WHOLE_SAVES = {
    "checkpoint.enable": True,
    "checkpoint.interval": 1,
    "checkpoint.last_save_model_only": False,
}


def options(folder: Path, phases=PHASES, **changes) -> list[str]:
    return [*tiny(folder, **MODEL | changes), as_option(phases)]


def train(folder: Path, *more: str, phases=PHASES, **changes) -> None:
    arguments = [*options(folder, phases, **changes), *more]
    with closing(Trainer(ConfigManager().parse_args(arguments))) as trainer:
        trainer.train()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(folder, **WHOLE_SAVES)
    return folder


def test_each_phase_is_as_a_run_of_its_own_from_the_checkpoint_of_the_one_before(
    one_process, tmp_path
):
    """Optimizer, expert bias and data position included; bit for bit."""
    folder, own = one_process, []
    for n, (seq_len, batch, local, yarn) in enumerate([(64, 4, 2, "on"), (16, 8, 4, "off")]):
        load = {
            "checkpoint.initial_load_path": one_process / f"checkpoint/step-{2 * n + 2}",
            "checkpoint.initial_load_model_only": False,
        }
        sizes = {
            "training.seq_len": seq_len,
            "training.local_batch_size": local,
            "training.global_batch_size": batch,
            "model.args.yarn": yarn,
            "training.steps": 2 * n + 4,
        }
        folder = tmp_path / str(n)
        train(folder, phases=[{"tokens": 1e9}], **WHOLE_SAVES | load | sizes)
        own += losses(folder)
    assert own == losses(one_process)[2:]
    seen = records(one_process)
    assert [r["seq_len"] for r in seen] == [32, 32, 64, 64, 16, 16]
    assert [r["tokens_seen"] for r in seen] == [256, 512, 768, 1024, 1152, 1280]


def test_yarn_and_length_both_matter(one_process, tmp_path):
    """Otherwise the comparison above would say less."""
    without = [{k: v for k, v in phase.items() if k != "yarn"} for phase in PHASES]
    train(tmp_path / "auto", phases=without)  # on where longer than 32: the same
    assert losses(tmp_path / "auto") == losses(one_process)
    train(tmp_path / "off", phases=[phase | {"yarn": "off"} for phase in PHASES])
    assert losses(tmp_path / "off")[:2] == losses(one_process)[:2]
    assert losses(tmp_path / "off")[2] != losses(one_process)[2]


def test_checkpoints_say_which_context_the_weights_have(one_process):
    found = []
    for step in (2, 3, 6):
        meta = json.loads((one_process / f"checkpoint/step-{step}/meta.json").read_text())
        args = meta["model"]["all_args"]
        found.append((args["max_seq_len"], args["yarn"]))
    assert found == [(32, "auto"), (64, "on"), (16, "off")]


@pytest.mark.parametrize("stop", [2, 3], ids=["before the change", "behind it"])
def test_a_run_goes_on_around_a_change_with_the_same_bits(one_process, tmp_path, stop):
    workers = {"training.dataset_num_workers": 1}  # they have made longer sequences already
    train(tmp_path, **WHOLE_SAVES | workers | {"training.steps": stop})
    train(tmp_path, **WHOLE_SAVES | workers)
    assert losses(tmp_path) == losses(one_process)


def test_a_rewind_takes_the_sequences_back(tmp_path, monkeypatch):
    """Poison in step 3, the first long one; checkpoint of step 1. The data goes on behind what was
    read: that is what steps 2, 3, … of the oracle are given."""
    saves = WHOLE_SAVES | {"training.non_finite_loss": "rewind", "checkpoint.interval": 5}
    saves["checkpoint.enable_first_step_checkpoint"] = True
    # The loss is asked twice in each of the first steps (two micro-batches).
    monkeypatch.setattr(
        forward_backward, "build_loss", lambda *_, **__: poisoned_loss("loss nan", 5)
    )
    monkeypatch.setattr(DeepSeekV3Model, "computes_loss", False)  # of its own, on a GPU
    train(tmp_path, **saves | {"training.steps": 4})
    seen, replaced = records(tmp_path), records(tmp_path, "metrics.replaced.jsonl")
    assert [r["step"] for r in seen] == [1, 2, 3, 4]
    assert [r["step"] for r in replaced] == [2, 3]
    assert [r["seq_len"] for r in replaced + seen] == [32, 64, 32, 32, 64, 64]
    assert [r["rewinds"] for r in replaced + seen] == [0, 0, 0, 1, 1, 1]
    meta = json.loads((tmp_path / "checkpoint/step-1/meta.json").read_text())
    assert meta["model"]["all_args"]["max_seq_len"] == 32, "saved anew behind the rewind"


# Processes, the degree of data parallelism, options.
LAYOUTS = {
    "FSDP 2": (2, 2, []),
    # Validation, of a third length, would be compiled anew behind each change.
    "EP 2, compiled": (
        2,
        2,
        [*layout(2, *COMPILED, ep=2)[1], "--training.steps=4", "--validation.no-enable"],
    ),
    "CP 2": (2, 1, layout(2, cp=2)[1]),
    "CP 2, TP 2": (4, 1, layout(4, cp=2, tp=2)[1]),
    "PP 2": (2, 1, layout(2, ONE_BY_ONE, pp=2)[1]),
    "PP 2, CP 2, ZBVZeroBubble": (
        4,
        1,
        layout(4, *pipeline("ZBVZeroBubble", 4), ONE_BY_ONE, pp=2, cp=2)[1],
    ),
}
# Of another length and another batch than training has.
VALIDATION = {
    "validation.enable": True,
    "validation.freq": 2,
    "validation.dataset": "sample",
    "validation.seq_len": 8,
    "validation.local_batch_size": 4,
    "validation.steps": 1,
}


def train_here(folder: Path, phases: list[dict], more: list[str]) -> None:
    train(folder, *more, phases=phases, **VALIDATION)


def validation_losses(folder: Path) -> list[float]:
    return [r["validation_loss"] for r in records(folder) if "validation_loss" in r]


@pytest.fixture(scope="module")
def validated(tmp_path_factory) -> Path:
    """The first batch of validation of one process is that of two with half the size."""
    folder = tmp_path_factory.mktemp("validated")
    train(folder, **VALIDATION)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_changes_them_alike(ranks, validated, tmp_path, name):
    world_size, dp, more = LAYOUTS[name]
    sizes = [{"local_batch_size": size // dp} for size in (8, 4, 8)]
    phases = [phase | size for phase, size in zip(PHASES, sizes, strict=True)]
    more = [*more, f"--training.local_batch_size={8 // dp}"]
    more.append(f"--validation.local_batch_size={4 // dp}")
    ranks(world_size).run(train_here, tmp_path, phases, more)
    steps = 4 if "compiled" in name else STEPS
    assert losses(tmp_path) == pytest.approx(losses(validated)[:steps], rel=1e-6)
    expected = [] if "compiled" in name else validation_losses(validated)
    assert validation_losses(tmp_path) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "phase, more, sentence",
    [
        ({"seq_len": 0}, [], "phase 1: seq_len = 0 must be 1 or more"),
        ({"seq_len": 2048}, [], "tokens = 1000.0 must be .* at least one sequence .seq_len, 2048"),
        ({"local_batch_size": 3}, [], "local_batch_size = 3 x .*must divide the batch_size that"),
        (
            {"local_batch_size": 3, "batch_size": 8},
            [],
            "batch_size = 8 must be a multiple of 3.*set it to 6 or 9",
        ),
        ({"seq_len": 8}, ["--comm.mode=fake_backend"], "seq_len = 8 needs the data"),
        (
            {"yarn": "on"},
            ["--comm.mode=fake_backend"],
            'yarn = "on" needs the data positions of all ranks',
        ),
        ({"yarn": "maybe"}, [], 'yarn = "maybe" must be "auto", "on" or "off"'),
        ({"seq_len": 64}, ["--model.args.max_seq_len=32"], "phase 1: model.args.max_seq_len"),
        ({"yarn": "on"}, ["--model.name=qwen3"], "phase 1: model.args.yarn is not a model arg"),
        ({"seq_len": 8}, ["--validation.enable"], "validation.seq_len = 2048 must be at most"),
    ],
)
def test_what_a_phase_can_not_have_is_one_sentence(tmp_path, capsys, phase, more, sentence):
    arguments = options(tmp_path, [{"tokens": 1000} | phase])
    if "--model.name=qwen3" in more:
        arguments = [as_option([{"tokens": 1e6} | phase]), f"--job.dump_folder={tmp_path}"]
    assert main([*arguments, *more]) == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    "phase, degrees, sentence",
    [
        ({"seq_len": 30}, {"cp": 2}, r"phase 1: seq_len = 30 must be a multiple of 4"),
        ({"local_batch_size": 1}, {"pp": 2}, r"phase 1 local_batch_size over .* makes 1; change"),
    ],
)
def test_each_phase_must_fit_the_layout(monkeypatch, tmp_path, phase, degrees, sentence):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = options(tmp_path, [{"tokens": 1000} | phase])
    arguments += layout(2, ONE_BY_ONE, **degrees)[1]
    with pytest.raises(UserError, match=sentence):
        check_config(ConfigManager().parse_args(arguments))
