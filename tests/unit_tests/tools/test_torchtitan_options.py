"""Options of scripts under the names that they have in torchtitan, beside ours."""

from pathlib import Path

import pytest

from tests.scripts import script

TOKENIZER, CONFIG = (
    {"tokenizer*", "vocab.*", "merges.txt"},
    {"config.json", "generation_config.json"},
)
INDEX, WEIGHTS = {"model.safetensors.index.json"}, {"*.safetensors"}


def asked(monkeypatch, *options: str) -> tuple[str, dict]:
    module, calls = script("download_hf_assets.py"), []
    monkeypatch.setattr(module, "snapshot_download", lambda *a, **how: calls.append((*a, how)))
    assert module.main(list(options)) == 0
    ((repo, how),) = calls
    return repo, how


@pytest.mark.parametrize(
    ("options", "there", "not_there"),
    [
        ([], TOKENIZER | CONFIG, INDEX | WEIGHTS),
        (["--weights"], TOKENIZER | CONFIG | INDEX | WEIGHTS, {"*"}),
        (["--assets", "tokenizer"], TOKENIZER, CONFIG | INDEX | WEIGHTS),
        (["--assets", "config", "index"], CONFIG | INDEX, TOKENIZER | WEIGHTS),
        (["--assets", "safetensors"], INDEX | WEIGHTS, TOKENIZER | CONFIG),
        (["--additional_patterns", "*.md"], {"*.md"}, TOKENIZER | CONFIG | INDEX | WEIGHTS),
    ],
    ids=str,
)
def test_kinds_of_files(monkeypatch, options, there, not_there):
    repo, how = asked(monkeypatch, "owner/model", *options)
    patterns = set(how["allow_patterns"])
    assert repo == "owner/model" and there <= patterns and not patterns & not_there


def test_torchtitans_options_mean_what_they_do_there(monkeypatch):
    options = ["--repo_id", "owner/model", "--all", "--local_dir", "there", "--hf_token", "secret"]
    repo, how = asked(monkeypatch, *options)
    assert (repo, how["local_dir"], how["token"]) == ("owner/model", Path("there/model"), "secret")
    assert how["allow_patterns"] is None


@pytest.mark.parametrize("options", [[], ["a/b", "--repo_id", "a/b"]], ids=str)
def test_a_model_is_named_once(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("download_hf_assets.py").main(options)
    assert stopped.value.code == 2 and "name the model once" in capsys.readouterr().err


def test_the_converters_take_torchtitans_names(tmp_path):
    line = ["in", "out", "--hf_assets_path", str(tmp_path), "--export_dtype", "float32"]
    args = script("checkpoint_conversion/convert_to_hf.py").check(line)
    assert (args.assets, args.dtype) == (tmp_path, "float32")
