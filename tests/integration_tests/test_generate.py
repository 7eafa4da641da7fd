"""scripts/generate.py: text that is not plain UTF-8, and damaged files of the run it reads."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.scripts import script
from tests.tiny_run import tiny
from torchtitan.train import main

STEP = "checkpoint/step-1"


@pytest.fixture(scope="module")
def generate():
    return script("generate.py").main


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    options = {"checkpoint__enable": "true", "checkpoint__last_save_model_only": "true"}
    assert main(tiny(folder, training__steps=1, **options)) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def written_to(encoding: str, monkeypatch, call) -> bytes:
    raw = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        assert call() == 0
        sys.stdout.flush()
        return raw.getvalue()


@pytest.mark.parametrize(
    "encoding, start",
    [("utf-8", "é 深".encode()), ("ascii", rb"\xe9 \u6df1")],
)
def test_text_goes_out_in_any_encoding(encoding, start, generate, run, monkeypatch):
    options = [str(run / STEP), "--prompt", "é 深", "--max_new_tokens", "3", "--temperature", "0"]
    assert written_to(encoding, monkeypatch, lambda: generate(options)).startswith(start)


def test_as_many_tokens_come_as_there_are_positions(generate, run, capsys):
    """The model has 32; asked for by nobody, 128 tokens are too many for no prompt."""
    told = [str(run / STEP), "--prompt", "Once upon a time", "--temperature", "0"]
    assert generate(told) == 0
    assert len(capsys.readouterr().out) > len("Once upon a time\n")
    assert generate([*told, "--max_new_tokens", "32"]) == 2
    assert "lower max_new_tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("", "checkpoint is not a checkpoint; did you mean"),
        ("nothing", "/nothing does not exist; correct the"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_told(source, sentence, generate, run, capsys):
    assert generate([str(run / source), "--prompt", "a"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["a\udcff", "\ud800"])
def test_a_prompt_that_is_no_text_is_refused(prompt, generate, run, capsys):
    assert generate([str(run / STEP), "--prompt", "fine", "--prompt", prompt]) == 2
    assert f"prompt 2, {prompt!a}, must be text in UTF-8." in capsys.readouterr().err


def break_file(file: Path, content: bytes | None) -> None:
    """None: a folder takes its place."""
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)


DAMAGE = [b"", b"{", b"[]", b"{}", b"\xff\xfe{", b'{"model": 5}', b"[" * 100_000, None]


@pytest.mark.parametrize("content", [*DAMAGE, b'{"model": {"hf_assets_path": 5}}'])
def test_a_damaged_config_of_the_run_asks_for_the_tokenizer(content, generate, run, capsys):
    break_file(run / "config.json", content)
    options = [str(run / STEP), "--prompt", "a", "--max_new_tokens", "1"]
    assert generate(options) == 2
    assert "is damaged or has no model.hf_assets_path; name the tokenizer with --tokenizer." in (
        capsys.readouterr().err
    )


def test_a_tokenizer_that_is_gone_can_be_named(generate, run, capsys):
    config = {"model": {"hf_assets_path": "no/where"}}
    (run / "config.json").write_text(json.dumps(config))
    options = [str(run / STEP), "--prompt", "a", "--max_new_tokens", "1"]
    assert generate(options) == 2
    assert "no/where' is neither" in (err := capsys.readouterr().err) and "--tokenizer" in err
    break_file(run / "config.json", b"{")  # is not asked then
    assert generate([*options, "--tokenizer", "tests/assets/tokenizer"]) == 0


@pytest.mark.parametrize(
    "content",
    [
        *DAMAGE,
        b'{"model": {"name": "deepseek_v3", "flavor": "x"}}',
        b'{"model": {"name": "gpt", "flavor": "x", "all_args": {}}}',
        b'{"model": {"name": "deepseek_v3", "flavor": "x", "all_args": {"dim": "x"}}}',
        b'{"model": {"name": "deepseek_v3", "flavor": "x", "all_args": {"dim": -1}}}',
        b'{"model": {"name": "deepseek_v3", "flavor": "x", "all_args": {"colour": 1}}}',
    ],
)
def test_a_damaged_meta_is_told(content, generate, run, capsys):
    break_file(run / STEP / "meta.json", content)
    assert generate([str(run / STEP), "--prompt", "a"]) == 2
    err = capsys.readouterr().err
    assert "meta.json" in err and "Traceback" not in err


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_tensors_are_told(name, content, generate, run, capsys):
    break_file(run / STEP / name, content)
    assert generate([str(run / STEP), "--prompt", "a", "--max_new_tokens", "1"]) == 2
    err = capsys.readouterr().err
    assert str(run / STEP) in err and "Traceback" not in err and len(err.splitlines()[-1]) < 600


def test_the_help_says_how_tokens_are_chosen(generate, capsys):
    with pytest.raises(SystemExit):
        generate(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.8); 0 takes the likeliest token" in out and "(default: 0.95)" in out
