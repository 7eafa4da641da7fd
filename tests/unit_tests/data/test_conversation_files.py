"""Conversations from every kind of file: the same examples; a file that is wrong as a whole."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_run import tiny
from torchtitan.config import Chat, ConfigManager
from torchtitan.data import DatasetSettings, open_source
from torchtitan.data.chat import ChatRenderer
from torchtitan.data.sources import HubStream, Shard
from torchtitan.data.tokenizer import load_tokenizer
from torchtitan.tools.errors import UserError
from torchtitan.trainer.preflight import check_config

ASSETS = "tests/assets/tokenizer"


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


ROWS = [
    {"messages": [said("user", f"question {n}"), said("assistant", f"answer {n} " * (n % 4 + 1))]}
    for n in range(12)
]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS.append(
    {
        "messages": [
            said("user", "Add."),
            said("assistant", "", tool_calls=[CALL]),
            said("tool", "1"),
            said("assistant", "One."),
        ]
    }
)


def source_of(kind: str, folder, rows=ROWS):
    settings = DatasetSettings("training", "text", str(folder), format="chat")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        (folder / "rows.jsonl").write_text(lines)
    elif kind == "gzip":
        (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=5)
    else:
        (folder / "rows.jsonl").write_text(lines)
        files = str(folder / "rows.jsonl")
        stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
        return HubStream(settings, stream)
    return open_source(settings)


@pytest.mark.parametrize("kind", ["jsonl", "gzip", "parquet", "hub"])
def test_every_kind_of_file_gives_the_same_examples(kind, tmp_path):
    """Tables fill the fields that other rows have with null: it changes no token."""
    template = tmp_path / "with_calls.jinja"
    plain = Path(ASSETS, "chat_template.jinja").read_text()
    calls = "(message.tool_calls | tojson if message.tool_calls else '')"
    template.write_text(plain.replace("message.content + eos", f"message.content + {calls} + eos"))
    renderer = ChatRenderer(load_tokenizer(ASSETS), ASSETS, Chat(template=str(template)))
    (tmp_path / "rows").mkdir()
    records = list(source_of(kind, tmp_path / "rows").open(0, 0, Shard()))
    assert [record.problem for record in records] == [""] * len(ROWS)
    found = [renderer.examples(record.row, "chat") for record in records]
    expected = [renderer.examples(row, "chat") for row in ROWS]
    assert sorted(map(repr, found)) == sorted(map(repr, expected))


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("rows.txt", "Just text.", "it is plain text, no rows of conversations; set training.form"),
        ("rows.jsonl", '{"text": "x"}\n' * 3, "no 'messages' or 'conversations' key"),
        ("rows.json", '[{"messages": []}]', "it is one JSON array; write one object a line"),
        (
            "rows.jsonl",
            '{"messages": [{"role": "robot", "content": "x"}]}\n' * 2,
            "rows.jsonl line 1: unknown role",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_before_the_run(name, content, sentence, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_source(DatasetSettings("training", "text", str(tmp_path), format="chat"))


def test_a_tokenizer_without_a_template_is_refused_before_the_run(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(open(f"{ASSETS}/{name}", "rb").read())
    arguments = tiny(
        tmp_path,
        training__dataset="chat_sample",
        training__format="chat",
        model__args__attn_mask_type="block_causal",
        model__hf_assets_path=tmp_path,
    )
    with pytest.raises(UserError, match=r"no chat template.*chat\.template"):
        check_config(ConfigManager().parse_args(arguments))
