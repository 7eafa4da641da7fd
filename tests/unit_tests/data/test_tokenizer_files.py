"""Tokenizer folders that are slightly wrong: a sentence with the file's name, or a warning."""

import base64
import json
import shutil
from pathlib import Path

import pytest

from tests.unit_tests.data.test_tokenizer import RANKS, SHIPPED, write_ranks
from torchtitan.data.tokenizer import load_tokenizer
from torchtitan.tools.errors import UserError

BPE = {"type": "BPE", "vocab": {"h": 0, "1": 1}, "merges": []}


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    sentence = str(caught.value)
    assert "\n" not in sentence and str(folder) in sentence and "hf_assets_path" in sentence
    return sentence


def shipped(folder: Path, **files) -> Path:
    """The shipped tokenizer.json with other files beside it; a value that is no bytes is JSON."""
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{name}.json").write_bytes(data)
    return folder


def tokenizer_json(folder: Path, **fields) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


# ---------------------------------------------------------------------------------------------
# Beside the tokenizer
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        ("eos_token_id", 999999),
        ("eos_token_id", 2048),
        ("bos_token_id", -1),
        ("eos_token_id", "2"),
        ("eos_token_id", True),
        ("eos_token_id", 1.0),
        ("eos_token_id", [[1]]),
        ("eos_token_id", {"id": 1}),
        ("pad_token_id", 10**30),
    ],
)
def test_ids_that_the_tokenizer_has_not_are_refused(key, value, tmp_path):
    sentence = refusal(shipped(tmp_path, config={key: value}))
    assert f"config.json has {key} = {value!r}, which must be an id of the tokenizer" in sentence
    assert "from 0 to 2047" in sentence


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("token", [5, True, ["<|pad|>"], {}, {"content": 5}, "\ud800"])
def test_tokens_of_another_type_are_refused(file, token, tmp_path):
    sentence = refusal(shipped(tmp_path, **{file: {"bos_token": token}}))
    assert f"{file}.json has bos_token = {token!r}, which must be a token's text" in sentence


def test_what_the_files_may_say_works(tmp_path):
    """Tokens as tables, nulls, several ends, old files' -1 for no padding, a byte order mark."""
    config = {"eos_token_id": [2, 999999], "pad_token_id": -1, "bos_token_id": []}
    beside = {"bos_token": {"content": "<|end_of_text|>", "lstrip": False}, "pad_token": None}
    text = b"\xef\xbb\xbf" + json.dumps(beside).encode()
    ours = load_tokenizer(str(shipped(tmp_path, config=config, tokenizer_config=text)))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, None)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tokenizer(str(file)).encode("hi") == ours.encode("hi")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe{\x00", b"[" * 100_000, "folder", "link"]
)
def test_a_file_that_is_no_json_object_is_named(name, content, tmp_path):
    file = shipped(tmp_path) / name
    file.unlink(missing_ok=True)
    if content == "folder":
        file.mkdir()
    elif content == "link":  # a snapshot whose blob was deleted
        file.symlink_to(tmp_path / "gone")
    else:
        file.write_bytes(content)
    assert f"{name} could not be read as" in refusal(tmp_path)


# ---------------------------------------------------------------------------------------------
# tokenizer.json
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"model": BPE | {"vocab": {}}},
        {"model": BPE | {"merges": ["h x"]}},
        {"model": BPE | {"merges": ["h1"]}},
        {"model": BPE | {"vocab": {"h": -1}}},
        {"model": BPE | {"vocab": {"h": 0, "1": 1, "i": 1}}},
        {  # a panic
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            "model": BPE,
        },
        {"model": BPE | {"vocab": {"h": 0, "x": 1, "hx": 2}, "merges": ["h x"]}, "decoder": 5},
        {"model": BPE | {"merges": ["h 1"], "continuing_subword_prefix": "###"}},  # a panic
    ],
)
def test_a_broken_tokenizer_json_is_one_sentence(fields, tmp_path, capfd):
    assert "tokenizer.json could not be read as a Hug" in refusal(
        tokenizer_json(tmp_path, **fields)
    )
    assert "panicked" not in capfd.readouterr().err


def test_an_added_token_that_would_get_another_id_is_refused(tmp_path):
    content = json.loads((SHIPPED / "tokenizer.json").read_text())
    token = content["added_tokens"][0] | {"id": 5000, "content": "<new>"}
    content["added_tokens"].append(token)
    assert "its added token '<new>' the id 5000, but behind the tokens before it comes 2048" in (
        refusal(tokenizer_json(tmp_path, **content))
    )


def test_characters_that_vanish_are_told(tmp_path, caplog):
    tokenizer = load_tokenizer(str(tokenizer_json(tmp_path, model=BPE)))
    assert tokenizer.encode("hi 12") == [0, 1]
    assert "characters tried give no token and vanish from every text (' ', '\\n'" in caplog.text


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"h": 0}, "unk_token": "<unk>"},
        {"type": "Unigram", "vocab": [["h", -1.0]], "unk_id": None},
        BPE | {"unk_token": "<unk>"},
    ],
)
def test_text_that_cannot_be_encoded_is_told_at_the_start_and_refused_later(
    model, tmp_path, caplog
):
    tokenizer = load_tokenizer(str(tokenizer_json(tmp_path, model=model)))
    assert "can't be encoded (" in caplog.text
    assert tokenizer.encode("h") == [0]
    with pytest.raises(UserError, match="tokenizer.json can't encode the text 'x' "):
        tokenizer.encode("x")


def test_good_tokenizers_lose_nothing(tmp_path, caplog):
    load_tokenizer(str(SHIPPED))
    load_tokenizer(str(write_ranks(tmp_path / "a.tiktoken")))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


# ---------------------------------------------------------------------------------------------
# Rank files
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks, sentence",
    [
        ({bytes([i]): i for i in range(100)}, "without the single bytes 0x64, 0x65"),
        (RANKS | {b"th": 0}, "two tokens have the same rank"),
        (RANKS | {b"th": 2**32}, "a rank is beyond 32 bits"),
        (RANKS | {b"th": 10**30}, "a rank is beyond 32 bits"),
        (RANKS | {b"th": -1}, "line 257 is not 'base64 rank'"),
        (RANKS | {b"th": "1_0"}, "line 257 is not 'base64 rank'"),
    ],
)
def test_ranks_that_cannot_encode_text_are_refused(ranks, sentence, tmp_path, capfd):
    write_ranks(tmp_path / "x.tiktoken", ranks)
    assert sentence in refusal(tmp_path)
    assert "panicked" not in capfd.readouterr().err


def test_a_repeated_token_is_refused(tmp_path):
    file = write_ranks(tmp_path / "x.tiktoken")
    file.write_text(file.read_text() + f"{base64.b64encode(b'th').decode()} 999\n")
    assert "line 267 repeats a token" in refusal(tmp_path)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"pattern": 5}, "tiktoken.json has pattern = 5, which must be a regular expression"),
        ({"patern": "."}, "unknown key 'patern'; did you mean 'pattern'?"),
        ({"pattern": ""}, "could not be read as a tokenizer of single characters"),  # a panic
        ({"special_tokens": ["<x>"]}, "must be a table from tokens to ids"),
        ({"special_tokens": {"<x>": "300"}}, "special_tokens.'<x>' = '300'"),
        ({"special_tokens": {"<x>": -1}}, "special_tokens.'<x>' = -1"),
        ({"special_tokens": {"<x>": 2**40}}, "could not be read as a tiktoken rank file"),
        ({"special_tokens": {"<x>": 300, "<y>": 300}}, "two special tokens have the id 300"),
        ({"special_tokens": {"<x>": 300}, "eos_token": 5}, "has eos_token = 5"),
    ],
)
def test_wrong_settings_of_a_rank_file_are_refused(settings, sentence, tmp_path, capfd):
    write_ranks(tmp_path / "x.tiktoken")
    (tmp_path / "tiktoken.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert sentence in str(caught.value) and "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("table", [5, {"x": {"content": "<s>"}}, {"300": "<s>", "301": 5}])
def test_added_tokens_of_another_form_are_refused(table, tmp_path):
    write_ranks(tmp_path / "x.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": table}))
    assert "tokenizer_config.json has added_tokens_decoder" in refusal(tmp_path)


def test_a_pattern_that_leaves_text_out_is_told(tmp_path, caplog):
    write_ranks(tmp_path / "x.tiktoken")
    (tmp_path / "tiktoken.json").write_text(json.dumps({"pattern": r"\w+"}))
    load_tokenizer(str(tmp_path))
    assert "vanish from every text (' ', '\\n', '!'" in caplog.text


# ---------------------------------------------------------------------------------------------
# Where it is not
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "~nobody-of-this-name/x", "/dev/null"])
def test_paths_that_cannot_be_are_refused(path):
    with pytest.raises(UserError, match="is neither a folder nor a file here"):
        load_tokenizer(path)


def test_the_repository_of_the_flavor_is_named(tmp_path):
    command = "python scripts/download_hf_assets.py deepseek-ai/DeepSeek-V2-Lite"
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError) as caught:
            load_tokenizer(str(path), "deepseek-ai/DeepSeek-V2-Lite")
        assert command in str(caught.value)


def test_a_name_on_the_hub_is_answered_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "python scripts/download_hf_assets.py some-owner/Some.Model-7B"
    with pytest.raises(UserError) as caught:
        load_tokenizer("some-owner/Some.Model-7B")
    assert command in str(caught.value) and "assets/hf/Some.Model-7B" in str(caught.value)
    (tmp_path / "some-owner").mkdir()
    with pytest.raises(UserError) as caught:
        load_tokenizer("some-owner/Some.Model-7B")
    assert command not in str(caught.value)
