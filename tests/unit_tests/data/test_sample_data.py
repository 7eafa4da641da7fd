"""The shipped text and tokenizer: as described, and as the script builds them."""

import base64
import collections
import gzip
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "torchtitan/data/sample"


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts/build_sample_data.py"
    spec = importlib.util.spec_from_file_location("build_sample_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documents():
    lines = (SAMPLE / "sample.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_readme_tells_the_true_numbers(documents, tokenizer):
    counts = collections.Counter()
    for text in documents:
        counts.update(tokenizer.encode(text, add_bos=True, add_eos=True))
    total = counts.total()
    entropy = sum(n / total * math.log(total / n) for n in counts.values())
    told = re.findall(r"^\| .* \| ([\d.,]+)", (SAMPLE / "README.md").read_text(), re.MULTILINE)
    size = sum(len(text.encode()) for text in documents)
    assert told == [f"{len(documents):,}", f"{size:,}", f"{total:,}", f"{entropy:.4f}"]
    assert tokenizer.vocab_size == 2048


def test_the_shipped_tokenizer_is_the_one_trained_on_the_shipped_text(script, documents):
    trained = script.train_tokenizer(documents).to_str(pretty=True) + "\n"
    assert trained == (ROOT / "tests/assets/tokenizer/tokenizer.json").read_text(encoding="utf-8")


def test_entries_of_a_dictionary_package_are_read_once_and_in_order(script, tmp_path):
    entries = [
        "00 note\n",
        "alpha\n /al/, n.\n\n    Body “one”.\n\n      deeper\n",
        "beta\n\n\n\n    x\n",
    ]
    offsets = [sum(len(entry.encode()) for entry in entries[:n]) for n in range(4)]

    def number(value):  # base 64 without padding, most significant digit first
        digits = base64.b64encode(value.to_bytes(3, "big")).decode()
        return digits.lstrip("A") or "A"

    spans = [(number(a), number(b - a)) for a, b in zip(offsets, offsets[1:], strict=False)]
    index = [("00-database-info", 0), ("beta", 2), ("alpha", 1), ("alpha (another name)", 1)]
    lines = ["\t".join([word, *spans[entry]]) + "\n" for word, entry in index]
    (tmp_path / "jargon.index").write_text("".join(lines))
    (tmp_path / "jargon.dict.dz").write_bytes(gzip.compress("".join(entries).encode()))
    assert script.read_documents(tmp_path) == [
        "alpha\n/al/, n.\n\nBody “one”.\n\n  deeper",
        "beta\n\nx",
    ]


def test_check_finds_a_changed_file(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    built = {"a/b.txt": b"content"}
    assert script.check(built) == 1
    assert script.write(built) == 0 and script.check(built) == 0
    (tmp_path / "a/b.txt").write_bytes(b"contenT")
    assert script.check(built) == 1
