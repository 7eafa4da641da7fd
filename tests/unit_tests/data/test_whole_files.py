"""Files of which nothing can be used are refused by name, beside however many good ones."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from tests.unit_tests.data.kinds import opened, text_dataset
from torchtitan.data import whole_files
from torchtitan.tools.errors import UserError


def lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


CONTENT = lines(*[{"content": "x", "id": n} for n in range(31)])
KEY = "none of its 31 records has 'text' .they have: content, id.; set training.dataset_text_key"
NUMBERS = "'text' is a string in none of its 2 records .it is a number."
WRONG = {
    "another key": ("c.jsonl", CONTENT, KEY),
    "another key, json": ("c.json", CONTENT, KEY),
    "another key, gzip": ("c.jsonl.gz", gzip.compress(CONTENT), KEY),
    "numbers": ("c.jsonl", lines({"text": 1}, {"text": 2.5}), NUMBERS),
    "lists": ("c.jsonl", lines({"text": ["a"]}), "in none of its 1 records .it is a list."),
    "null": ("c.jsonl", lines({"text": None}), "in none of its 1 records .it is null."),
    "no records": ("c.jsonl", b'"a"\n"b"\n', "can be used .2 not a JSON object; first .* line 1"),
    "a table": ("c.jsonl", b"text,id\nhello,1\n", "none of its 2 .*2 broken JSON.*one JSON object"),
    "mixed faults": ("c.jsonl", b'{"a": 1}\nx\n', "1 no 'text' key, 1 broken JSON"),
    "gzip as lines": ("c.jsonl", gzip.compress(CONTENT), "a gzip file, though .* in .jsonl; conv"),
    "gzip as text": ("c.txt", gzip.compress(b"text"), "a gzip file, though .* ends in .txt"),
    "zstandard": ("c.jsonl", b"\x28\xb5\x2f\xfdxxxx", "a zstandard file, though"),
    "lines as gzip": ("c.json.gz", lines({"text": "x"}), "no gzip file, though .* in .jsonl.gz"),
    "lines as parquet": ("c.parquet", lines({"text": "x"}), "no parquet file, though"),
    "cut parquet": ("c.parquet", b"PAR1 and no more", "no parquet file"),
    "an array": (
        "c.json",
        b'[\n {"text": "x"}\n]',
        "it is one JSON array; write one object a line",
    ),
    "tar in gzip": ("c.json.gz", gzip.compress(b"c.json\0" * 90), "none of its 1 records can be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_wrong_as_a_whole_is_refused_beside_good_ones(tmp_path, jsonl, case):
    name, content, sentence = WRONG[case]
    jsonl("a.jsonl", ["good", "better"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        opened("text", str(tmp_path), "text")
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ({"body": ["x"], "id": [1]}, "none of its 1 records has 'text' .they have: body, id"),
        ({"text": [1, 2]}, "'text' is a column of int64, not of strings"),
        ({"text": [["a"]]}, "'text' is a column of list<.*, not of strings"),
        ({"text": [b"a"]}, "'text' is a column of binary, not of strings"),
    ],
)
def test_a_parquet_file_is_judged_by_its_schema(tmp_path, jsonl, column, sentence):
    jsonl("a.jsonl", ["good"])
    pq.write_table(pa.table(column), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=sentence):
        opened("text", str(tmp_path), "text")


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_columns_of_strings_of_each_kind_are_read(tmp_path, kind):
    types = {"large_string": pa.large_string(), "string": pa.string()}
    array = pa.array(["x", "y"], types.get(kind))
    table = pa.table({"text": array.dictionary_encode() if kind == "dictionary" else array})
    pq.write_table(table, tmp_path / "c.parquet")
    assert len(opened("text", str(tmp_path), "text")) == 2


@pytest.mark.parametrize(
    "content",
    [
        CONTENT + lines({"text": "one is enough"}),
        lines({"text": ""}),  # of the right form
        b"\n\n",  # nothing at all
    ],
)
def test_a_file_that_has_one_good_record_or_none_to_judge_is_kept(tmp_path, jsonl, content):
    jsonl("a.jsonl", ["good"])
    (tmp_path / "c.jsonl").write_bytes(content)
    opened("text", str(tmp_path), "text")


def test_a_long_file_is_judged_by_its_beginning(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(whole_files, "PROBED_DOCUMENTS", 20)
    jsonl("a.jsonl", ["good"])
    (tmp_path / "c.jsonl").write_bytes(CONTENT)
    with pytest.raises(UserError, match="none of its first 20 records has 'text'"):
        opened("text", str(tmp_path), "text")


def test_the_keys_are_named_where_nothing_at_all_is_usable(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(CONTENT)
    with pytest.raises(UserError, match="c.jsonl line .*no 'text' key .they have: content, id"):
        opened("text", str(tmp_path), "text")


def test_a_text_file_is_said_to_be_one_document(tmp_path, jsonl, log):
    jsonl("a.jsonl", ["one", "two"])
    for name in ("b.txt", "c.txt"):
        (tmp_path / name).write_text("a\nb\n")
    opened("mine", str(tmp_path), "text")
    assert any(
        line.startswith("Data mine: 4 documents, 3 files, ")
        and line.endswith("(each of the 2 .txt files is one document)")
        for line in log
    )
    assert any("and 4 are few: cut the files into more of them" in line for line in log)


def test_a_parquet_file_alone_names_the_columns_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no 'text' key .they have: body, id"):
        next(iter(text_dataset(opened("text", str(tmp_path), "text"), OneTokenAByte(), 4)))


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array(["x"]), pa.array(["y"])]
    table = pa.Table.from_arrays(columns, names=["text", "text"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(UserError, match="several columns named 'text'"):
        opened("text", str(tmp_path), "text")
