"""Conversations end to end: the debug model learns them by heart and says them, also elsewhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.generate import find_chat
from scripts.generate import main as generate
from scripts.show_batch import main as show_batch
from tests.pages import REPO
from torchtitan.config import Chat
from torchtitan.tools.errors import UserError
from torchtitan.train import main

TOML = str(REPO / "train_configs/chat_debug_model.toml")
ROWS = [
    json.loads(line)["messages"]
    for line in (REPO / "torchtitan/data/sample/chat.jsonl").read_text().splitlines()
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    options = {
        "job.config_file": TOML,
        "job.dump_folder": folder,
        "metrics.enable_tensorboard": "false",
        "metrics.enable_report": "false",
        "training.steps": 120,
        "validation.freq": 120,
        "checkpoint.last_save_model_only": "false",
    }
    assert main([f"--{key}={value}" for key, value in options.items()]) == 0
    return folder


def test_it_answers_word_for_word_in_several_turns(run, capsys):
    talk = next(messages for messages in ROWS if len(messages) == 6)
    questions = [each for m in talk if m["role"] == "user" for each in ("--prompt", m["content"])]
    options = [str(run / "checkpoint/step-120"), "--chat", "--temperature=0", *questions]
    assert generate(options) == 0
    said = re.findall(r"assistant: (.*)", capsys.readouterr().out)
    assert said == [m["content"] for m in talk if m["role"] == "assistant"]


def test_turns_come_from_the_terminal_where_no_prompt_is_given(run, capsys, monkeypatch):
    lines = iter(["What is a bug?\n", "\n", ""])
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
    assert generate([str(run / "checkpoint/step-120"), "--chat", "--temperature=0"]) == 0
    assert "assistant: A bug is a mistake in a program." in capsys.readouterr().out


def test_transformers_says_the_same_from_the_export(run, tmp_path):
    """Twenty conversations of one question, through the export's own chat template."""
    from scripts.checkpoint_conversion.convert_to_hf import main as convert

    folder = str(tmp_path / "hf")
    assets = str(REPO / "tests/assets/tokenizer")
    assert convert([str(run / "checkpoint/step-120"), folder, "--assets", assets]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    single = [messages for messages in ROWS if len(messages) == 2][:20]
    assert len(single) == 20
    for question, answer in single:
        prompt = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == answer["content"]


def test_the_runs_own_template_and_its_variables_are_used(run, tmp_path):
    """Without its weights: what config.json above the checkpoints says is what counts."""
    checkpoint = tmp_path / "run/checkpoint/step-120"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(run / "checkpoint/step-120")
    settings = json.loads((run / "config.json").read_text())
    settings["chat"] |= {"template": "deepseek_v32", "template_kwargs": {"thinking": True}}
    saved = tmp_path / "run/config.json"
    saved.write_text(json.dumps(settings))
    chat = find_chat(checkpoint, None)
    assert (chat.template, chat.template_kwargs) == ("deepseek_v32", {"thinking": True})
    assert find_chat(checkpoint, "other.jinja") == Chat(template="other.jinja")
    saved.write_text(json.dumps(settings | {"chat": {"template": 3}}))
    with pytest.raises(UserError, match="has a damaged table chat; name the template with --chat_"):
        find_chat(checkpoint, None)
    del settings["chat"]  # of an earlier version
    saved.write_text(json.dumps(settings))
    assert find_chat(checkpoint, None) == Chat()


def test_show_batch_marks_what_is_trained(tmp_path, capsys):
    page = tmp_path / "batch.html"
    assert show_batch([TOML, "--html", str(page), "--job.dump_folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Trained tokens stand in doubled square brackets; --- begins a document.")
    assert re.search(r"Answer:\n\[\[[A-Z].*<\|end_of_text\|>\]\]", out)
    trained = re.findall(r"\[\[(.*?)\]\]", out)
    answers = {m["content"] for messages in ROWS for m in messages if m["role"] == "assistant"}
    assert trained and {text.removesuffix("<|end_of_text|>") for text in trained} <= answers
    assert re.findall(r"Sequence \d+: \d+ documents, [\d.]+ % filled, [\d,]+ of", out)
    marked = re.findall(r"<mark>(.*?)</mark>", page.read_text())
    assert len(marked) == len(trained)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--system", "Be brief.", "--prompt", "x"], "--system needs --chat"),
        ([], "--prompt must be given"),
        (["--chat", "--chat_template", "nowhere.jinja", "--prompt", "x"], "nowhere.jinja"),
    ],
)
def test_wrong_options_are_one_sentence(run, options, words, capsys):
    assert generate([str(run / "checkpoint/step-120"), *options]) == 2
    assert words in capsys.readouterr().err


def test_show_batch_needs_a_batch(capsys):
    assert show_batch([TOML, "--batches", "0"]) == 2
    assert "--batches = 0 must be at least 1" in capsys.readouterr().err
