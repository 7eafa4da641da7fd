"""From a run to Hugging Face, through every script, into runs and texts again."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from tests.scripts import script
from tests.tiny_run import losses, tiny
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.components.huggingface.load_save import log_differences
from torchtitan.models.deepseek_v3 import DeepSeekV3StateDictAdapter
from torchtitan.train import main

PROMPTS = ["--prompt", "The hacker", "--prompt", "A long prompt about words and their meaning"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's outputs: checkpoint/step-1, whole, and checkpoint/step-2-hf."""
    folder = tmp_path_factory.mktemp("run")
    options = {
        "training__steps": 2,
        "checkpoint__enable": "true",
        "checkpoint__interval": 1,
        "checkpoint__last_save_in_hf": "true",
    }
    assert main(tiny(folder, **options)) == 0
    return folder


def continued(folder: Path, source: Path, **changes) -> list[float]:
    options = {
        "checkpoint__enable": "true",
        "checkpoint__load_only": "true",
        "checkpoint__initial_load_path": source,
        "training__steps": 2,
    }
    assert main(tiny(folder, **(options | changes))) == 0
    return losses(folder)


def test_a_run_begins_alike_from_the_folder_and_from_its_conversion(run, tmp_path):
    hf = run / "checkpoint/step-2-hf"
    convert = script("checkpoint_conversion/convert_from_hf.py")
    assert convert.main([str(hf), str(tmp_path / "ours")]) == 0
    from_hf = continued(tmp_path / "a", hf, checkpoint__initial_load_in_hf="true")
    assert continued(tmp_path / "b", tmp_path / "ours") == from_hf
    # It holds the state of no run: there is nothing but weights to take.
    whole = {"checkpoint__initial_load_model_only": "false"}
    assert continued(tmp_path / "c", tmp_path / "ours", **whole) == from_hf
    assert from_hf[0] < losses(run)[0] - 0.1  # it has learned there


def test_export_in_the_run_and_afterwards_are_the_same_files(run, tmp_path):
    """A checkpoint of the same step, converted; tokenizer and all."""
    again = {
        "checkpoint__enable": "true",
        "checkpoint__last_save_model_only": "true",
        "training__steps": 2,
        "job__dump_folder": tmp_path,
    }
    assert main(tiny(tmp_path / "run", **again)) == 0
    convert = script("checkpoint_conversion/convert_to_hf.py")
    arguments = [str(tmp_path / "run/checkpoint/step-2"), str(tmp_path / "hf")]
    assert convert.main([*arguments, "--dtype", "float32", "--assets", str(tokenizer())]) == 0
    expected = run / "checkpoint/step-2-hf"
    names = {file.name for file in expected.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert {file.name for file in (tmp_path / "hf").iterdir()} == names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (expected / name).read_bytes(), name


def tokenizer() -> Path:
    return Path(__file__).parents[1] / "assets/tokenizer"


def texts(arguments: list[str]) -> str:
    """Return what generate.py prints on this rank."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        # In fp32 everywhere: bf16 rounds differently on two ranks, and draws other tokens.
        options = [*PROMPTS, "--max_new_tokens", "16", "--dtype", "float32"]
        assert script("generate.py").main([*arguments, *options]) == 0
    return out.getvalue()


@pytest.mark.parametrize("drawing", [["--temperature", "0"], ["--temperature", "1", "--seed", "5"]])
def test_two_ranks_write_what_one_writes(ranks, run, drawing):
    source = str(run / "checkpoint/step-2-hf")
    alone = texts([source, *drawing])
    assert alone.startswith("The hacker") and "A long prompt" in alone
    assert ranks(2).run(texts, [source, *drawing]) == [alone, ""]


def test_a_checkpoint_writes_what_its_export_writes(run, tmp_path, capsys):
    convert = script("checkpoint_conversion/convert_to_hf.py")
    step = run / "checkpoint/step-1"
    options = ["--dtype", "float32", "--assets", str(tokenizer())]
    assert convert.main([str(step), str(tmp_path / "hf"), *options]) == 0
    greedy = ["--temperature", "0"]
    assert texts([str(step), *greedy]) == texts([str(tmp_path / "hf"), *greedy])
    said = capsys.readouterr().err
    assert "Model: deepseek_v3 debugmodel, " in said and "Model: deepseek_v3 hf, " in said


def test_an_fp8_folder_goes_into_a_run(run, tmp_path):
    convert = script("checkpoint_conversion/convert_to_hf.py")
    assert convert.main([str(run / "checkpoint/step-1"), str(tmp_path / "fp8"), "--fp8"]) == 0
    in_hf = {"checkpoint__initial_load_in_hf": "true"}
    quantized = in_hf | {"checkpoint__initial_load_in_hf_quantized": "true"}
    rounded = continued(tmp_path / "a", tmp_path / "fp8", **quantized)
    exact = continued(tmp_path / "b", run / "checkpoint/step-1")
    assert rounded[0] == pytest.approx(exact[0], rel=2e-3) and rounded[0] != exact[0]
    refused = tiny(
        tmp_path / "c",
        checkpoint__enable="true",
        checkpoint__initial_load_path=tmp_path / "fp8",
        **in_hf,
    )
    assert main(refused) == 2


# ---------------------------------------------------------------------------------------------
# Sentences
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments, sentence",
    [
        ("generate.py", ["no/where", "--prompt", "x"], "no/where does not exist; correct"),
        ("generate.py", ["HF", "--prompt", "x", "--top_p", "2"], "top_p = 2.0 must be above 0"),
        (
            "generate.py",
            ["HF", "--prompt", "x", "--max_new_tokens", "500"],
            "but the model has positions for 32",
        ),
        ("generate.py", ["RUN/checkpoint", "--prompt", "x"], "did you mean RUN/checkpoint/step-1?"),
        ("checkpoint_conversion/convert_from_hf.py", ["no/where", "out"], "does not exist"),
        (
            "checkpoint_conversion/convert_from_hf.py",
            ["ODD", "out"],
            "model_type 'llama', which no",
        ),
        ("generate.py", ["ODD", "--prompt", "x"], "(supported: 'deepseek_v2', 'deepseek_v3', "),
        ("checkpoint_conversion/convert_from_hf.py", ["HF", "/proc/no/out"], "could not be made"),
        ("checkpoint_conversion/convert_to_hf.py", ["no/where", "out"], "does not exist; correct"),
        (
            "checkpoint_conversion/convert_to_hf.py",
            ["RUN/checkpoint/step-1", "out", "--max_file_gb", "nan"],
            "--max_file_gb nan must be a finite number above 0.",
        ),
        (
            "checkpoint_conversion/convert_to_hf.py",
            ["RUN/checkpoint/step-1", "out", "--assets", "no/where"],
            "--assets no/where does not exist",
        ),
        ("download_hf_assets.py", ["deepseek-ai/DeepSeek-V3"], "check the network"),
        ("download_hf_assets.py", ["a/b/c"], "is not the name of a model"),
    ],
)
def test_a_script_ends_with_a_sentence_and_2(
    run, tmp_path, monkeypatch, capsys, name, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "ODD"
    odd.mkdir()
    (odd / "config.json").write_text('{"model_type": "llama"}')
    (odd / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    arguments = [a.replace("HF", "RUN/checkpoint/step-2-hf") for a in arguments]
    assert script(name).main([a.replace("RUN", str(run)) for a in arguments]) == 2
    err = capsys.readouterr().err.replace(str(run), "RUN")
    assert sentence in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_without_a_path_the_weights_are_sought_beside_the_tokenizer(tmp_path, capsys):
    in_hf = {"checkpoint__enable": "true", "checkpoint__initial_load_in_hf": "true"}
    assert main(tiny(tmp_path, **in_hf)) == 2
    assert "tests/assets/tokenizer is not a Hugging Face folder" in capsys.readouterr().err


def test_a_model_that_hugging_face_lacks_is_told_before_the_run(tmp_path, capsys):
    options = {
        "checkpoint__enable": "true",
        "checkpoint__last_save_in_hf": "true",
        "model__args__moe_args__score_func": "softmax",
    }
    assert main(tiny(tmp_path, **options)) == 2
    assert "no Hugging Face class computes this model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_config_that_means_another_model_is_told(run, tmp_path, caplog):
    """Shapes fit, the meaning doesn't: no error, but a warning that names it."""
    other = tmp_path / "hf"
    other.mkdir()
    for file in (run / "checkpoint/step-2-hf").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text()) | {"routed_scaling_factor": 7.0}
    (other / "config.json").write_text(json.dumps(config))
    original = HFFolder(run / "checkpoint/step-2-hf").config
    adapter = DeepSeekV3StateDictAdapter(DeepSeekV3StateDictAdapter.args_of(original))
    log_differences(HFFolder(other), adapter)
    assert "differs from model.args in routed_scaling_factor 7.0 (1.0 here)" in (caplog.text)
