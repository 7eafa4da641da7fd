"""YaRN and the length of the context stay with weights that a shorter run resumes from."""

import json
from pathlib import Path

import pytest

from tests.tiny_run import as_option, losses, tiny
from torchtitan.train import main

# Longer sequences than 32 turn YaRN on.
MODEL = {"model.args.original_seq_len": 32, "model.args.rope_factor": 8, "training.steps": 2}
SAVES = {
    "checkpoint.enable": True,
    "checkpoint.interval": 2,
    "checkpoint.last_save_model_only": False,
}
EXPORTS = {"checkpoint.last_save_model_only": True, "checkpoint.last_save_in_hf": True}
STAYS = "YaRN stays on, because the weights were trained with it"


def train(folder: Path, *more: str, **changes) -> None:
    settings = MODEL | SAVES | {name.replace("__", "."): v for name, v in changes.items()}
    assert main([*tiny(folder, **settings), *more]) == 0


def said(capsys) -> str:
    """Since the last call."""
    return "".join(capsys.readouterr())


def stored_args(folder: Path, step: int) -> dict:
    return json.loads((folder / f"checkpoint/step-{step}/meta.json").read_text())["model"][
        "all_args"
    ]


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """A run with YaRN: as our checkpoint of step 2, and in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("long")
    train(folder, training__seq_len=64)
    load = {"checkpoint__initial_load_path": folder / "checkpoint/step-2"}
    train(folder / "hf", training__seq_len=64, **load, **EXPORTS)
    return folder


@pytest.mark.parametrize("kind", ["ours", "Hugging Face's"])
def test_yarn_stays_on_under_loaded_weights(long, tmp_path, capsys, kind):
    load = {"checkpoint.initial_load_path": long / "checkpoint/step-2"}
    if kind == "Hugging Face's":
        load = {"checkpoint.initial_load_path": long / "hf/checkpoint/step-2-hf"}
        load["checkpoint.initial_load_in_hf"] = True
    train(tmp_path / "auto", **load)
    text = said(capsys)
    assert text.count(STAYS) == 1 and "differs from model.args" not in text
    assert stored_args(tmp_path / "auto", 2)["yarn"] == "on"
    assert json.loads((tmp_path / "auto/model_args.json").read_text())["yarn"] == "on"
    train(tmp_path / "on", **load, model__args__yarn="on")
    assert "YaRN" not in said(capsys)
    assert losses(tmp_path / "auto") == losses(tmp_path / "on")

    train(tmp_path / "off", **load, model__args__yarn="off")
    told = "differs from model.args in" if "in_hf" in str(load) else "YaRN is off from now on"
    assert told in said(capsys)
    assert losses(tmp_path / "off")[0] != losses(tmp_path / "on")[0]
    # ... and goes on in the same way.
    train(tmp_path / "auto", training__steps=4)
    train(tmp_path / "on", training__steps=4, model__args__yarn="on")
    assert losses(tmp_path / "auto") == losses(tmp_path / "on")


def test_a_run_that_is_resumed_with_shorter_sequences_keeps_it(tmp_path, capsys):
    train(tmp_path, training__seq_len=64)
    train(tmp_path, training__steps=4)
    assert STAYS in said(capsys) and stored_args(tmp_path, 4)["yarn"] == "on"


def test_a_phase_asks_for_it_by_length_as_the_run_does(long, tmp_path, capsys):
    load = {"checkpoint.initial_load_path": long / "checkpoint/step-2"}
    train(tmp_path, as_option([{"tokens": 1e6, "seq_len": 16, "yarn": "auto"}]), **load)
    assert STAYS in said(capsys)
    assert stored_args(tmp_path, 2)["yarn"] == "on"


def test_other_numbers_of_yarn_and_yarn_by_a_longer_run_are_told(long, tmp_path, capsys):
    load = {"checkpoint.initial_load_path": long / "checkpoint/step-2"}
    train(tmp_path / "4", **load, training__seq_len=64, model__args__rope_factor=4)
    assert "YaRN differs from that of the weights' training: rope_factor 4.0 (8.0 so far)" in said(
        capsys
    )
    train(tmp_path / "short")
    said(capsys)
    load = {"checkpoint.initial_load_path": tmp_path / "short/checkpoint/step-2"}
    train(tmp_path / "longer", **load, training__seq_len=64)
    assert "YaRN is on from now on, but the weights were trained without it" in said(capsys)


PHASES = [
    {"tokens": 300, "seq_len": 64, "local_batch_size": 4},  # two steps, the second over its end
    {"tokens": 1e6, "seq_len": 32, "local_batch_size": 4},
]


def test_phases_tell_of_it_and_a_resumed_run_goes_on_as_it_was(tmp_path, capsys):
    train(tmp_path / "whole", as_option(PHASES), training__steps=4)
    text = said(capsys)
    assert text.count("YaRN is off from now on") == 1
    train(tmp_path / "parts", as_option(PHASES))
    train(tmp_path / "parts", as_option(PHASES), training__steps=4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert STAYS not in said(capsys)


def test_exports_name_the_longest_context_of_all_runs(tmp_path):
    """Without YaRN: 64 tokens, then phases of 16 and of 8."""
    off = {"model__args__yarn": "off"}
    train(tmp_path / "long", training__seq_len=64, **off)
    load = {"checkpoint__initial_load_path": tmp_path / "long/checkpoint/step-2"}
    phases = [{"tokens": 64, "seq_len": 16}, {"tokens": 1e6, "seq_len": 8}]
    train(tmp_path / "loaded", as_option(phases), **load, **EXPORTS, **off)
    train(tmp_path / "alone", as_option(phases), **EXPORTS, **off)
    lengths = []
    for name in ("loaded", "alone"):
        config = json.loads((tmp_path / name / "checkpoint/step-2-hf/config.json").read_text())
        lengths.append(config["max_position_embeddings"])
    assert lengths == [64, 16]
    again = {"checkpoint__initial_load_path": tmp_path / "loaded/checkpoint/step-2-hf"}
    again["checkpoint__initial_load_in_hf"] = True
    train(tmp_path / "again", **again, **EXPORTS, **off)
    config = json.loads((tmp_path / "again/checkpoint/step-2-hf/config.json").read_text())
    assert config["max_position_embeddings"] == 64
