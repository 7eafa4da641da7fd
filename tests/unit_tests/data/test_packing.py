"""Packing and splitting: nothing lost, nothing twice, bitwise the same after a resume."""

import gzip
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from tests.unit_tests.data.kinds import KINDS, TEXTS, lists, make_source, opened, pack, text_dataset
from torchtitan.data import parquet as row_groups
from torchtitan.data import sources as sources_module
from torchtitan.data.dataloader import build_dataloader
from torchtitan.data.permutation import order
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.sources import Shard, WindowShuffledReader
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.errors import UserError


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    """Two or three of the row groups below are open together (in this process, not in workers)."""
    monkeypatch.setattr(row_groups, "POOL_BYTES", 700)


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abc é", min_size=1).filter(str.strip), min_size=1, max_size=8),
    seq_len=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_examples_are_the_reference_packing(tmp_path_factory, texts, seq_len, seed):
    path = tmp_path_factory.mktemp("x") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = opened("text", str(path), "text")
    ours = text_dataset(source, OneTokenAByte(), seq_len, num_streams=1, seed=seed, infinite=False)
    ordered = [texts[i] for i in order(len(texts), seed, 0)]
    assert lists(ours) == pack(ordered, OneTokenAByte(), seq_len)


def test_every_token_but_the_first_is_a_label_exactly_once(tmp_path):
    source = make_source("plain", tmp_path)
    examples = list(text_dataset(source, OneTokenAByte(), 7, num_streams=1, infinite=False))
    labels = Counter(i for _, ids in lists(examples) for i in ids)
    del labels[IGNORE_INDEX]
    tokens = Counter()
    for text in TEXTS:
        tokens.update(OneTokenAByte().encode(text, add_bos=True, add_eos=True))
    tokens[256] -= 1  # the very first token of all
    assert labels == tokens


def test_examples_are_int64_and_a_document_longer_than_many_windows_goes_through(jsonl):
    source = opened("text", str(jsonl("a.jsonl", ["x" * 5000])), "text")
    examples = list(text_dataset(source, OneTokenAByte(), 64, infinite=False))
    assert lists(examples) == pack(["x" * 5000], OneTokenAByte(), 64)
    assert all(e["input"].dtype == ids.dtype == torch.int64 for e, ids in examples)


def test_a_tokenizer_without_begin_end_and_pad_packs_the_bare_text(jsonl):
    bare = OneTokenAByte()
    bare.bos_id = bare.eos_id = bare.pad_id = None
    source = opened("text", str(jsonl("a.jsonl", ["abcdef"])), "text")
    examples = lists(text_dataset(source, bare, 4, infinite=False))
    a, b, c, d, e, f = b"abcdef"
    assert examples == [([a, b, c, d], [b, c, d, e]), ([e, 0, 0, 0], [f, -100, -100, -100])]


def test_a_tokenizer_that_has_no_token_for_any_text_is_told(jsonl):
    mute = OneTokenAByte()
    mute.bos_id = mute.eos_id = None
    mute.encode = lambda text, add_bos=False, add_eos=False: []
    source = opened("text", str(jsonl("a.jsonl", ["abcdef"])), "text")
    with pytest.raises(UserError, match="no token for 10,000 documents .*hf_assets_path"):
        next(iter(text_dataset(source, mute, 4)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 4, 6, 10])
def test_the_shards_of_an_epoch_are_disjoint_and_complete(tmp_path, kind, count):
    """With more shards than files (3, of the hub 4), fewer, and as many."""
    source = make_source(kind, tmp_path)
    for epoch in range(2):
        shards = [
            [r.text for r in source.open(0, epoch, Shard(index, count))] for index in range(count)
        ]
        assert Counter(text for shard in shards for text in shard) == Counter(TEXTS)
        assert all(shards)


def test_gzip_files_of_one_document_are_spread_over_all_shards(tmp_path):
    for number in range(9):
        line = json.dumps({"text": str(number)}).encode()
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(line))
    source = opened("text", str(tmp_path), "text")
    shards = [[r.text for r in source.open(0, 0, Shard(rank, 4))] for rank in range(4)]
    assert sorted(len(shard) for shard in shards) == [2, 2, 2, 3]
    assert sorted(text for shard in shards for text in shard) == sorted("012345678")


@pytest.mark.parametrize("shard", [Shard(), Shard(1, 2)])
@pytest.mark.parametrize("window", [1, 3])
def test_a_stream_with_damage_resumes_at_every_record(tmp_path, monkeypatch, shard, window):
    monkeypatch.setattr(sources_module, "WINDOW", window)
    for name in "abc":
        noise = "".join(chr(0x4E00 + ord(c) * 7 % 997) for c in name * 50)  # fills gzip's blocks
        lines = [json.dumps({"text": f"{name}{n} {noise[n:]}"}) + "\n" for n in range(20)]
        whole = gzip.compress("".join(lines).encode())
        (tmp_path / f"{name}.jsonl.gz").write_bytes(whole[:-12] if name < "c" else whole)
    source = opened("text", str(tmp_path), "text")
    reader = source.open(0, 0, shard)
    states, records = [reader.state_dict()], []
    for record in reader:
        records.append(record)
        states.append(reader.state_dict())
    assert [r.problem for r in records if r.problem]
    for taken, state in enumerate(states):
        again = source.open(0, 0, shard)
        again.load_state_dict(state)
        assert list(again) == records[taken:], f"resumed after {taken} records"


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_its_own_order_and_a_seed_always_the_same(tmp_path, kind):
    source = make_source(kind, tmp_path)

    def epoch(seed, number):
        return tuple(record.text for record in source.open(seed, number, Shard()))

    assert epoch(1, 0) == epoch(1, 0)
    assert len({epoch(1, 0), epoch(1, 1), epoch(2, 0), tuple(TEXTS)}) == 4


def test_infinite_data_goes_on_with_the_next_epoch_without_a_gap(tmp_path):
    source = make_source("plain", tmp_path)
    dataset = text_dataset(source, OneTokenAByte(), 50, num_streams=1, seed=3)
    texts = [r.text for epoch in range(3) for r in source.open(3, epoch, Shard())]
    expected = pack(texts, OneTokenAByte(), 50)[:-1]  # the last one would go on with epoch 3
    found = [example for example, _ in zip(dataset, expected, strict=False)]
    assert lists(found) == expected


def test_a_window_is_shuffled_within_itself_only(tmp_path):
    source = make_source("plain", tmp_path)
    stream = source.open(0, 0, Shard())
    unshuffled = [record.text for record in source.open(0, 0, Shard())]
    shuffled = [r.text for r in WindowShuffledReader(stream, 0, 0, window=10)]
    assert shuffled != unshuffled
    for start in range(0, len(TEXTS), 10):
        assert sorted(shuffled[start : start + 10]) == sorted(unshuffled[start : start + 10])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_knows_the_skipped_documents_of_the_run(jsonl, num_workers):
    """Documents before the last batch count, whatever its workers have prepared beyond it."""
    texts = [TEXTS[n] if n % 3 else "" for n in range(30)]
    source = opened("mine", str(jsonl("a.jsonl", texts + ["last"])), "text")
    counts, rank_slice = [], RankSlice(batch_size=2, num_workers=num_workers)
    dataset = text_dataset(
        source, OneTokenAByte(), 40, rank_slice=rank_slice, num_streams=1, infinite=False
    )
    loader = build_dataloader(dataset)
    for batch in loader:
        assert list(batch[0]) == ["input"], "the trainer's batch holds the model's input only"
        counts.append(loader.skipped_documents)
    assert counts[-1] == 10
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_the_state_behind_each_example_says_where_the_next_begins(tmp_path):
    """In an iterator of the same process, and as the position from which a dataset starts."""
    source = make_source("plain", tmp_path)
    dataset = text_dataset(source, OneTokenAByte(), 40, num_streams=1, seed=1)
    states = []
    iterator = iter(dataset)
    examples = [(next(iterator), states.append(iterator.state_dict()))[0] for _ in range(12)]
    for taken in range(1, 12):
        again = text_dataset(source, OneTokenAByte(), 40, num_streams=1, seed=1)
        resumed = iter(again)
        resumed.load_state_dict(states[taken - 1])
        again.start(taken, {0: json.loads(states[taken - 1]["streams"][0])})
        for rest, first in ((resumed, 0), (iter(again), taken)):
            for n in range(taken, 12):
                assert lists([next(rest)]) == lists(examples[n : n + 1])
                assert rest.state_dict()["streams"] == states[n]["streams"]
                assert rest.state_dict()["examples"] == n + 1 - first
