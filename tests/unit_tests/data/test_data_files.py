"""Files: every kind gives its documents; every kind of damage is skipped, counted and named."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit_tests.data.kinds import named, opened, text_dataset
from torchtitan.data.folders import search
from torchtitan.data.sources import Shard
from torchtitan.tools.errors import UserError


def texts_of(path, text_key="text", seed=0, epoch=0, shard=None):
    source = opened("text", str(path), text_key)
    records = source.open(seed, epoch, shard or Shard())
    return [record.text for record in records if not record.problem]


def problems_of(path, text_key="text"):
    source = opened("text", str(path), text_key)
    found = {record.where: record.problem for record in source.open(0, 0, Shard())}
    return {where.rpartition("/")[2]: problem for where, problem in found.items() if problem}


TEXTS = ["first", "zweites Stück", "第三", "fourth\nwith lines", "🙂"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "folder", "*.t*"])
def test_each_kind_of_file_gives_its_documents(tmp_path, name):
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / name, row_group_size=2)
    elif name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
    elif "json" in name:
        (tmp_path / name).write_bytes(lines.rstrip("\n").encode())  # no newline at the end
    else:
        folder = tmp_path / "folder/deeper" if name == "folder" else tmp_path
        folder.mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(TEXTS):
            (folder / f"{number}.txt").write_bytes(text.encode())
    assert sorted(texts_of(tmp_path / name)) == sorted(TEXTS)


def test_a_folder_of_mixed_kinds_gives_all_documents_and_no_hidden_ones(tmp_path, jsonl):
    jsonl("x/a.jsonl", ["one", "two"])
    jsonl("x/.cache/b.jsonl", ["hidden"])
    (tmp_path / "x/c.txt").write_text("three")
    (tmp_path / "x/d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}\n'))
    (tmp_path / "x/notes.md").write_text("not a document")
    assert sorted(texts_of(tmp_path / "x")) == ["four", "one", "three", "two"]


def test_a_local_copy_of_c4_gives_the_split_that_was_asked_for(tmp_path):
    for split in ("train", "validation"):
        file = tmp_path / f"en/c4-{split}.00000-of-00001.json.gz"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(json.dumps({"text": split}).encode()))
    for name, text in (("c4", "train"), ("c4_validation", "validation")):
        source = opened(name, str(tmp_path), "text")
        assert [record.text for record in source.open(0, 0, Shard())] == [text]


BAD_LINES = [
    (b'{"text": "good"}', None),
    (b'{"text": "cut', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'["text"]', "not a JSON object"),
    (b'{"body": "x"}', "no 'text' key"),
    (b'{"text": 5}', "'text' is not a string"),
    (b'{"text": null}', "'text' is not a string"),
    (b'{"text": " \\n"}', "empty text"),
    (b"", "empty line"),
    (b'{"text": "caf\xe9"}', "wrong encoding"),
    (b'{"text": "half \\ud83d"}', "wrong encoding"),
]


@pytest.mark.parametrize("compress", [False, True])
def test_each_bad_line_is_named_with_its_reason(tmp_path, compress):
    content = b"\n".join(line for line, _ in BAD_LINES) + b"\n"
    path = tmp_path / ("a.jsonl.gz" if compress else "a.jsonl")
    path.write_bytes(gzip.compress(content) if compress else content)
    expected = {
        f"{path.name} line {number}": problem
        for number, (_, problem) in enumerate(BAD_LINES, start=1)
        if problem
    }
    assert problems_of(path) == expected
    assert texts_of(path) == ["good"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_damage(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert sorted(texts_of(tmp_path / "a.jsonl")) == ["a", "b"]


def test_bad_rows_of_parquet_are_named_and_empty_files_told(tmp_path, log):
    pq.write_table(pa.table({"text": ["good", None, " "]}), tmp_path / "a.parquet")
    (tmp_path / "d.txt").write_bytes("öl".encode("utf-16"))
    (tmp_path / "e.jsonl").write_bytes(b"")
    assert problems_of(tmp_path) == {
        "a.parquet row 2": "'text' is not a string",
        "a.parquet row 3": "empty text",
        "d.txt": "wrong encoding",
    }
    assert any(
        "Skipped 1 of 3 files, first" in line and "e.jsonl: it is empty" in line for line in log
    )


def test_a_damaged_gzip_gives_what_is_before_the_damage(tmp_path):
    lines = b"".join(b'{"text": "document %d"}\n' % n for n in range(20_000))
    whole = gzip.compress(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (where, problem), *more = problems_of(tmp_path / "a.jsonl.gz").items()
    read = len(texts_of(tmp_path / "a.jsonl.gz"))
    assert (problem, more) == ("unreadable gzip", []) and where == f"a.jsonl.gz after line {read}"
    assert 1000 < read < 20_000


def test_bad_documents_are_counted_and_only_the_first_and_some_milestones_are_named(
    jsonl, tokenizer, log
):
    path = jsonl("a.jsonl", ["good"] * 10 + [""] * 200 + [7] * 50)
    source = opened("mine", str(path), "text")
    log.clear()
    list(text_dataset(source, tokenizer, seq_len=4, infinite=False))
    named = [line for line in log if "Skipped" in line]
    assert len(named) == 5 and all(f"{path} line " in line for line in named)
    for line, total in zip(named[3:], (10, 100), strict=True):
        counts = re.fullmatch(rf"Skipped {total} documents so far \((.*)\), the last: .*", line)
        assert sum(int(number) for number in re.findall(r"(\d+) [e']", counts[1])) == total


def test_skipped_documents_are_reported_though_the_epoch_never_ends(jsonl, tokenizer, log):
    """The count grows with the data read, over many epochs, and the log stays short."""
    source = opened("mine", str(jsonl("a.jsonl", ["good"] * 2 + [""] * 18)), "text")
    log.clear()
    for _ in zip(
        range(200), text_dataset(source, tokenizer, seq_len=4, num_streams=2), strict=False
    ):
        pass
    reported = [line.split(" ")[1] for line in log if "so far" in line]
    assert reported == ["10", "100", "1,000"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"body": "x"}\n', r"no usable document .*1 no 'text' key; first .*line 1"),
        ("a.jsonl", b"", r"None of the 1 file.* can be read .*it is empty"),
        ("a.txt", b"\xff\xfe", r"no usable document .*1 wrong encoding"),
        ("a.parquet", b"nonsense", r"None of the 1 file.* can be read .*no parquet file"),
        ("a.csv", b"text", r"holds no file that ends in .*\.jsonl"),
        ("a.jsonl.gz", gzip.compress(b""), r"has no document at all in .*a.jsonl.gz"),
        ("a.jsonl.gz", b"nonsense", r"no usable document .*1 unreadable gzip"),
    ],
)
def test_data_with_nothing_usable_is_refused_in_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        opened("text", str(tmp_path / name), "text")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_are_found_in_one_order_whatever_the_file_system_says(tmp_path, jsonl):
    for name in ("b.jsonl", "a.jsonl", "c/a.jsonl"):
        jsonl(name, ["x"])
    found = search(named("text", str(tmp_path))).files
    assert [str(f.relative_to(tmp_path)) for f in found] == ["a.jsonl", "b.jsonl", "c/a.jsonl"]
    assert search(named("text", str(tmp_path / "**/a.jsonl"))).files == [found[0], found[2]]
