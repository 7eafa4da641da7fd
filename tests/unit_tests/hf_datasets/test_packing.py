"""Packing, splitting and resuming: nothing lost, nothing twice, bitwise the same after a resume."""

import gzip
import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit_tests.hf_datasets.byte_tokenizer import OneTokenAByte
from torchtitan.components.dataloader import build_dataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.hf_datasets import TextDataset, open_source, row_groups
from torchtitan.hf_datasets import sources as sources_module
from torchtitan.hf_datasets.order import order
from torchtitan.hf_datasets.sources import HubStream, Shard, WindowShuffledReader

TEXTS = [f"document {n} " + "word " * (n % 13) + str(n * n) for n in range(41)]

KINDS = ["plain", "gzip", "parquet", "hub"]


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    """Two or three of the row groups below are open together (in this process, not in workers)."""
    monkeypatch.setattr(row_groups, "POOL_BYTES", 700)


def pack(texts, tokenizer, seq_len):
    """The reference: all tokens of all documents in one list, cut with a stride of seq_len."""
    tokens = [i for text in texts for i in tokenizer.encode(text, add_bos=True, add_eos=True)]
    examples = []
    for start in range(0, len(tokens) - 1, seq_len):
        window = tokens[start : start + seq_len + 1]
        missing = seq_len + 1 - len(window)
        inputs = window[:-1] + [tokenizer.pad_id] * missing
        examples.append((inputs, window[1:] + [-100] * missing))
    return examples


def lists(examples):
    return [(example["input"].tolist(), labels.tolist()) for example, labels in examples]


def make_source(kind, folder, texts=TEXTS):
    """The same documents as indexed files, streamed gzip files, row groups, and a hub stream."""
    if kind == "hub":
        paths = []
        for number in range(4):
            paths.append(str(folder / f"hub{number}.jsonl"))
            with open(paths[-1], "w") as file:
                file.writelines(json.dumps({"text": t}) + "\n" for t in texts[number::4])
        rows = datasets.load_dataset("json", data_files=paths, split="train", streaming=True)
        return HubStream("org/name", rows, "text")
    for number in range(3):
        if kind == "parquet":
            table = pa.table({"text": texts[number::3]})
            pq.write_table(table, folder / f"parquet{number}.parquet", row_group_size=4)
            continue
        lines = [json.dumps({"text": t}) + "\n" for t in texts[number::3]]
        path = folder / f"{kind}{number}.jsonl"
        path.write_text("".join(lines))
        if kind == "gzip":
            (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    return open_source("text", str(folder / f"{kind}*"), "text")


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abc é", min_size=1).filter(str.strip), min_size=1, max_size=8),
    seq_len=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_examples_are_the_reference_packing(tmp_path_factory, texts, seq_len, seed):
    path = tmp_path_factory.mktemp("x") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = open_source("text", str(path), "text")
    ours = TextDataset(source, OneTokenAByte(), seq_len, seed=seed, infinite=False)
    ordered = [texts[i] for i in order(len(texts), seed, 0)]
    assert lists(ours) == pack(ordered, OneTokenAByte(), seq_len)


def test_every_token_but_the_first_is_a_label_exactly_once(tmp_path):
    source = make_source("plain", tmp_path)
    examples = list(TextDataset(source, OneTokenAByte(), 7, infinite=False))
    labels = Counter(i for _, ids in lists(examples) for i in ids)
    del labels[IGNORE_INDEX]
    tokens = Counter()
    for text in TEXTS:
        tokens.update(OneTokenAByte().encode(text, add_bos=True, add_eos=True))
    tokens[256] -= 1  # the very first token of all
    assert labels == tokens


def test_examples_are_int64_and_a_document_longer_than_many_windows_goes_through(jsonl):
    source = open_source("text", str(jsonl("a.jsonl", ["x" * 5000])), "text")
    examples = list(TextDataset(source, OneTokenAByte(), 64, infinite=False))
    assert lists(examples) == pack(["x" * 5000], OneTokenAByte(), 64)
    assert all(e["input"].dtype == ids.dtype == torch.int64 for e, ids in examples)


def test_a_tokenizer_without_begin_end_and_pad_packs_the_bare_text(jsonl):
    bare = OneTokenAByte()
    bare.bos_id = bare.eos_id = bare.pad_id = None
    source = open_source("text", str(jsonl("a.jsonl", ["abcdef"])), "text")
    examples = lists(TextDataset(source, bare, 4, infinite=False))
    a, b, c, d, e, f = b"abcdef"
    assert examples == [([a, b, c, d], [b, c, d, e]), ([e, 0, 0, 0], [f, -100, -100, -100])]


# `datasets` itself splits a hub stream over real worker processes: tested with them below.
LAYOUTS = [("hub", 1, 1), ("hub", 2, 1), ("hub", 3, 1)]
LAYOUTS += [(kind, *n) for kind in KINDS[:3] for n in ((1, 1), (3, 1), (2, 3), (5, 2))]


@pytest.mark.parametrize(("kind", "dp_degree", "num_workers"), LAYOUTS)
def test_the_shards_of_an_epoch_are_disjoint_and_complete(tmp_path, kind, dp_degree, num_workers):
    source = make_source(kind, tmp_path)
    for epoch in range(2):
        shards = [
            [r.text for r in source.open(0, epoch, Shard(rank, dp_degree, worker, num_workers))]
            for rank in range(dp_degree)
            for worker in range(num_workers)
        ]
        assert Counter(text for shard in shards for text in shard) == Counter(TEXTS)
        assert all(shards)


def test_gzip_files_of_one_document_are_spread_over_all_shards(tmp_path):
    for number in range(9):
        line = json.dumps({"text": str(number)}).encode()
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(line))
    source = open_source("text", str(tmp_path), "text")
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
    source = open_source("text", str(tmp_path), "text")
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
    dataset = TextDataset(source, OneTokenAByte(), 50, seed=3)
    texts = [r.text for epoch in range(3) for r in source.open(3, epoch, Shard())]
    expected = pack(texts, OneTokenAByte(), 50)[:-1]  # the last one would go on with epoch 3
    found = [example for example, _ in zip(dataset, expected, strict=False)]
    assert lists(found) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("infinite", [True, False])
def test_resume_at_every_example_gives_the_same_rest(tmp_path, monkeypatch, kind, infinite):
    """Over two epoch borders; windows of 8 documents, so that resumes fall inside windows."""
    monkeypatch.setattr(sources_module, "WINDOW", 8)
    texts = TEXTS[:19]
    source = make_source(kind, tmp_path, texts)
    sizes = sum(len(text) + 2 for text in texts)
    count = 3 * sizes // 40 if infinite else sizes // 40 + 1

    def new():
        return TextDataset(source, OneTokenAByte(), 40, seed=1, infinite=infinite)

    run, states = new(), []
    states.append(run.state_dict())
    examples = []
    for example in run:
        examples.append(example)
        states.append(json.loads(json.dumps(run.state_dict())))
        if len(examples) == count:
            break
    expected = lists(examples)
    for taken, state in enumerate(states):
        again = new()
        again.load_state_dict(state)
        assert again.state_dict() == state
        rest = [example for example, _ in zip(again, range(count - taken), strict=False)]
        assert lists(rest) == expected[taken:], f"resumed after {taken} examples"


def test_the_counts_of_skipped_documents_survive_a_resume(jsonl, log):
    texts = [TEXTS[n] if n % 3 else "" for n in range(30)]
    source = open_source("mine", str(jsonl("a.jsonl", texts)), "text")
    dataset = TextDataset(source, OneTokenAByte(), 32, infinite=False)
    examples = iter(dataset)
    for _ in range(9):
        next(examples)
    resumed = TextDataset(source, OneTokenAByte(), 32, infinite=False)
    resumed.load_state_dict(dataset.state_dict())
    log.clear()
    list(resumed)
    assert [line for line in log if "20 documents read, 10 skipped (10 empty text)" in line]


def test_a_loaded_state_counts_once_and_the_next_pass_is_a_whole_one(tmp_path):
    source = make_source("plain", tmp_path)
    dataset = TextDataset(source, OneTokenAByte(), 40, infinite=False)
    whole = lists(dataset)
    state = None
    for number, _ in enumerate(dataset):
        if number == 4:
            state = dataset.state_dict()
            break
    dataset.load_state_dict(state)
    assert lists(dataset) == whole[5:]
    assert lists(dataset) == whole


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
    """Those before the last batch, of all its workers; a resumed run counts on, none twice."""
    texts = [TEXTS[n] if n % 3 else "" for n in range(30)]
    source = open_source("mine", str(jsonl("a.jsonl", texts + ["last"])), "text")
    loader = loader_of(source, num_workers, infinite=False)
    counts, states = [], []
    for batch in loader:
        assert list(batch[0]) == ["input"], "the trainer's batch holds the model's input only"
        counts.append(loader.skipped_documents)
        states.append(json.loads(json.dumps(loader.state_dict())))
    records = source.open(1, 0, Shard())
    last_usable = max(n for n, record in enumerate(source.open(1, 0, Shard())) if record.text)
    assert num_workers or counts[-1] == sum(not r.text for r in list(records)[:last_usable])
    assert 7 <= counts[-1] <= 10 and counts == sorted(counts)
    for taken in (0, 3, len(states) - 2):
        again = loader_of(source, num_workers, infinite=False)
        again.load_state_dict(states[taken])
        rest = [again.skipped_documents for _ in again]
        assert rest == counts[taken + 1 :], f"resumed after batch {taken}"


def loader_of(source, num_workers, infinite=True):
    dataset = TextDataset(source, OneTokenAByte(), 40, seed=1, infinite=infinite)
    return build_dataloader(dataset, batch_size=2, num_workers=num_workers, dp_rank=0, dp_degree=1)


@pytest.mark.parametrize("kind", ["plain", "parquet", "hub"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_with_the_same_batches(tmp_path, kind, num_workers):
    """Through the loader and its worker processes, across epoch borders, state as JSON."""
    source = make_source(kind, tmp_path, TEXTS[:19])
    count, points = 24, (1, 6, 15)
    states, batches = {}, []
    loader = loader_of(source, num_workers)
    for batch in loader:
        batches.append(batch)
        if len(batches) in points:
            states[len(batches)] = json.loads(json.dumps(loader.state_dict()))
        if len(batches) == count:
            break
    expected = lists(batches)
    for taken, state in states.items():
        again = loader_of(source, num_workers)
        again.load_state_dict(state)
        rest = [batch for batch, _ in zip(again, range(count - taken), strict=False)]
        assert lists(rest) == expected[taken:], f"resumed after {taken} batches"


@pytest.mark.parametrize("kind", ["plain", "hub"])
def test_two_workers_read_each_document_of_an_epoch_once(tmp_path, kind):
    source = make_source(kind, tmp_path)
    labels = Counter()
    for _, ids in loader_of(source, num_workers=2, infinite=False):
        labels.update(ids.flatten().tolist())
    del labels[IGNORE_INDEX]
    tokens = Counter({257: len(TEXTS), 256: len(TEXTS) - 2})  # two streams: two first tokens
    for text in TEXTS:
        tokens.update(text.encode())
    assert labels == tokens
