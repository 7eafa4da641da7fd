"""A path that does not exist is answered with the nearest one that does, in any key."""

import pytest

from tests.tiny_run import tiny
from torchtitan.tools.near_path import near_path
from torchtitan.train import main as train


@pytest.fixture
def there(tmp_path, monkeypatch):
    (tmp_path / "models/tokenizer/deep").mkdir(parents=True)
    (tmp_path / "models/debug_model.toml").touch()
    (tmp_path / "models/debug_model.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("models/tokeniser", "models/tokenizer"),
        ("modles/tokenizer/deep", "models/tokenizer/deep"),
        ("modles/tokeniser/depe", "models/tokenizer/deep"),
        ("models/debug_modle.toml", "models/debug_model.toml"),
        ("models/debug_modle.txt", "models/debug_model.txt"),
        ("models/Debug_Model", "models/debug_model."),
        ("models/weights", None),
        ("models/tokeniser/gone", None),
        ("models/x.toml", None),
        ("models/*.txt", None),
        ("models/tokenizer", None),
        ("a\0b", None),
        ("x" * 5000, None),
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_the_nearest_path_is_named_where_there_is_one(there, wrong, near, absolute):
    root = f"{there}/" if absolute else ""
    found = near_path(root + wrong, "else.")
    assert found.startswith(f"did you mean {root}{near}") if near else found == "else."


@pytest.mark.parametrize(
    "key, others",
    [
        ("model.hf_assets_path", []),
        ("model.hf_assets_path", ["--model.flavor=from_hf"]),
        ("model.hf_assets_path", ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"]),
        ("training.dataset_path", ["--training.dataset=text"]),
        (
            "validation.dataset_path",
            ["--validation.enable", "--validation.seq_len=32", "--validation.dataset=text"],
        ),
        ("checkpoint.initial_load_path", ["--checkpoint.enable"]),
        (
            "checkpoint.initial_load_path",
            ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"],
        ),
        ("lora.initial_load_path", ['--model.converters=["lora"]']),
        ("job.config_file", []),
    ],
)
def test_each_path_key_with_a_typing_mistake_is_one_sentence(there, capfd, key, others):
    options = [*tiny(there / "out"), f"--{key}={there}/models/tokeniser", *others]
    assert train(options) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if " E " in line]
    assert key in line and line.endswith(f"did you mean {there}/models/tokenizer?")
