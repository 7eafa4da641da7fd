"""One order of examples: all layouts see the same batches, and each goes on for another."""

import json
import re
from collections import Counter
from itertools import islice

import pyarrow.parquet as pq
import pytest

from tests.pages import REPO
from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from tests.unit_tests.data.kinds import KINDS, TEXTS, lists, make_source, opened, pack, text_dataset
from torchtitan.config import ConfigManager
from torchtitan.data import parquet as row_groups
from torchtitan.data import sources as sources_module
from torchtitan.data.build import report_streams
from torchtitan.data.dataloader import build_dataloader, merge_states
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.sources import Shard, streams_of_documents, streams_of_files
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.errors import UserError

CHAT = REPO / "train_configs/chat_debug_model.toml"
SEQ_LEN, STREAMS, SEED = 20, 3, 1
# Every fourth document is unusable; the others fill some 33 windows an epoch.
DOCUMENTS = [text if n % 4 else "" for n, text in enumerate(TEXTS[:31])]
USABLE = [text for text in DOCUMENTS if text]


@pytest.fixture
def small_windows(monkeypatch):
    """In this process (not in workers), so that positions lie inside of windows and pools."""
    monkeypatch.setattr(sources_module, "WINDOW", 4 * STREAMS)
    monkeypatch.setattr(row_groups, "POOL_BYTES", 250 * STREAMS)


class Run:
    """All ranks of one layout, in this process."""

    def __init__(self, source, dp_degree=1, batch_size=1, workers=0, state=None, **dataset):
        self.loaders = []
        settings = dict(seed=SEED, num_streams=STREAMS) | dataset
        for rank in range(dp_degree):
            rank_slice = RankSlice(rank, dp_degree, batch_size, workers)
            dataset = text_dataset(
                source, OneTokenAByte(), SEQ_LEN, rank_slice=rank_slice, **settings
            )
            self.loaders.append(build_dataloader(dataset))
            if state:
                self.loaders[-1].load_state_dict(json.loads(json.dumps(state)))
        self.batches = [iter(loader) for loader in self.loaders]

    def take(self, accumulation):
        """The examples of a step of that many batches a rank."""
        found = [batch for rank in self.batches for batch in islice(rank, accumulation)]
        return [example for batch in found for example in examples_of(batch)]

    def state(self):
        return merge_states([loader.local_state() for loader in self.loaders])


def examples_of(batch):
    inputs, labels = lists([batch])[0]
    return [(tuple(i), tuple(j)) for i, j in zip(inputs, labels, strict=True)]


def expected_order(source, count):
    """Example n is window n // STREAMS of stream n % STREAMS, whose documents are the source's."""
    streams = []
    for stream in range(STREAMS):
        records = [
            r for epoch in range(3) for r in source.open(SEED, epoch, Shard(stream, STREAMS))
        ]
        streams.append(pack([r.text for r in records if r.text], OneTokenAByte(), SEQ_LEN)[:-1])
    found = [streams[n % STREAMS][n // STREAMS] for n in range(count)]
    return [(tuple(inputs), tuple(labels)) for inputs, labels in found]


LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 1), (4, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_sees_the_same_global_batches(tmp_path, small_windows, kind):
    """Over an epoch border, with the sequences of a step growing on the way (a batch ramp)."""
    source = make_source(kind, tmp_path, DOCUMENTS)
    order = expected_order(source, 60)
    for dp_degree, batch_size in LAYOUTS:
        run, begin = Run(source, dp_degree, batch_size), 0
        for sequences in (12, 12, 12, 24):
            step = run.take(sequences // (dp_degree * batch_size))
            expected = order[begin : begin + sequences]
            assert Counter(step) == Counter(expected), (dp_degree, batch_size, begin)
            begin += sequences


@pytest.mark.parametrize(("kind", "dp_degree"), [("plain", 2), ("hub", 1)])
def test_loader_workers_see_the_same_global_batches(tmp_path, kind, dp_degree):
    """`datasets` would split a hub stream over real worker processes once more by itself."""
    source = make_source(kind, tmp_path, DOCUMENTS)
    order = expected_order(source, 48)
    run = Run(source, dp_degree, batch_size=3, workers=2)
    for begin in range(0, 48, 12):
        assert Counter(run.take(4 // dp_degree)) == Counter(order[begin : begin + 12])


CHAIN = [
    # batches, ranks, batch size
    (3, 4, 1),
    (2, 3, 2),
    (2, 1, 5),
    (4, 2, 1),
    (1, 3, 7),
]


def comparable(state):
    """Without what `datasets` says of itself, which differs after a resume and means the same; how
    many documents of the stream were read stands beside it."""
    state = json.loads(json.dumps(state))
    for position in state["lanes"].values():
        position["reader"].get("stream", {}).pop("dataset", None)
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_layouts_is_one_run(tmp_path, small_windows, kind):
    """The ranks see the uninterrupted order, no example twice and none left out, over an epoch
    border; and each position equals the one of a single process that never stopped."""
    source = make_source(kind, tmp_path, DOCUMENTS)
    alone, state, seen = Run(source), None, []
    for batches, dp_degree, batch_size in CHAIN:
        run = Run(source, dp_degree, batch_size, state=state)
        step = run.take(batches)
        assert len(step) == batches * dp_degree * batch_size
        assert Counter(step) == Counter(alone.take(len(step)))
        seen += step
        state = run.state()
        assert comparable(state) == comparable(alone.state())
        assert state == json.loads(json.dumps(state))
    assert Counter(seen) == Counter(expected_order(source, len(seen)))
    assert state["skipped_documents"] >= 7, "of an epoch 8 are, and all streams are in the second"
    assert min(position["epoch"] for position in state["lanes"].values()) >= 1


def test_documents_are_seen_once_however_often_the_layout_changes(tmp_path, small_windows):
    """By the documents themselves: decoded from what the layouts saw, until each stream's first
    epoch is over."""
    source = make_source("plain", tmp_path, DOCUMENTS)
    state, windows = None, {}
    for batches, dp_degree, batch_size in CHAIN:
        begin = state["consumed"] if state else 0
        run = Run(source, dp_degree, batch_size, state=state)
        for rank, loader in enumerate(run.batches):
            mine = [e for batch in islice(loader, batches) for e in examples_of(batch)]
            for m, (_, labels) in enumerate(mine):
                windows[begin + m * dp_degree + rank] = labels
        state = run.state()
    assert sorted(windows) == list(range(state["consumed"]))
    firsts = []
    for stream in range(STREAMS):
        labels = [i for n in sorted(windows) if n % STREAMS == stream for i in windows[n]]
        texts = "".join(chr(i) if i < 256 else "\n" * (i == 257) for i in labels).split("\n")
        size = sum(1 for r in source.open(SEED, 0, Shard(stream, STREAMS)) if r.text)
        assert len(texts) > size
        firsts += texts[:size]
    assert sorted(firsts) == sorted(USABLE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_may_stop_at_every_example(tmp_path, small_windows, kind):
    source = make_source(kind, tmp_path, DOCUMENTS)
    order = expected_order(source, 46)
    alone = Run(source)
    for consumed in range(40):
        again = Run(source, 2, state=alone.state())
        assert again.take(3) and again.state()["consumed"] == consumed + 6
        assert Counter(Run(source, 2, state=alone.state()).take(3)) == Counter(
            order[consumed : consumed + 6]
        )
        assert alone.take(1) == order[consumed : consumed + 1]


def test_workers_may_come_and_go(tmp_path):
    """Two workers of each of two ranks -> none on one rank -> two again, whatever they prepared."""
    source = make_source("gzip", tmp_path, DOCUMENTS)
    first = Run(source, 2, batch_size=2, workers=2)
    seen = first.take(3)
    second = Run(source, 1, batch_size=3, state=first.state())
    seen += second.take(4)
    third = Run(source, 1, batch_size=4, workers=2, state=second.state())
    seen += third.take(5)
    assert Counter(seen) == Counter(expected_order(source, 44))
    alone = Run(source)
    alone.take(44)
    assert third.state() == alone.state()


def test_a_longer_context_goes_on_with_the_same_documents(tmp_path):
    """Positions count tokens, so another seq_len may follow: nothing lost, nothing twice."""
    source = make_source("plain", tmp_path, USABLE)
    short = text_dataset(source, OneTokenAByte(), 8, num_streams=1, seed=SEED)
    loader = build_dataloader(short)
    begin = [i for _, labels in islice(loader, 9) for i in labels.flatten().tolist()]
    longer = build_dataloader(text_dataset(source, OneTokenAByte(), 30, num_streams=1, seed=SEED))
    longer.load_state_dict(merge_states([loader.local_state()]))
    both = begin + [i for _, labels in islice(longer, 3) for i in labels.flatten().tolist()]
    texts = [record.text for record in source.open(SEED, 0, Shard())]
    expected = [i for _, labels in pack(texts, OneTokenAByte(), 1) for i in labels]
    assert both == expected[: 9 * 8 + 3 * 30]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dp_degree", [1, 2])
def test_a_single_pass_gives_every_token_once_on_any_layout(tmp_path, dp_degree, workers):
    """Each stream's very first token is no label. The ranks may end at different times."""
    source = make_source("plain", tmp_path)
    run = Run(source, dp_degree, batch_size=2, workers=workers, infinite=False)
    labels = Counter(i for _, ids in run.take(None) for i in ids)
    del labels[IGNORE_INDEX]
    tokens = Counter({257: len(TEXTS), 256: len(TEXTS) - STREAMS})
    for text in TEXTS:
        tokens.update(text.encode())
    assert labels == tokens
    with pytest.raises(AssertionError, match="single pass"):
        run.state()


def test_the_second_pass_is_a_whole_one_too(tmp_path):
    source = make_source("plain", tmp_path)
    run = Run(source, batch_size=2, infinite=False)
    assert lists(run.loaders[0]) == lists(run.loaders[0]) != []


# ---------------------------------------------------------------------------------------------
# How many streams
# ---------------------------------------------------------------------------------------------


def test_the_number_of_streams_shares_well_among_powers_of_two():
    """d ranks read nothing twice where d divides the streams."""
    files = {1: 1, 2: 2, 3: 3, 6: 6, 30: 30, 48: 48, 67: 4, 1000: 32, 1024: 64, 5000: 64}
    assert {n: streams_of_files(n) for n in files} == files
    documents = {1: 1, 31: 1, 32: 2, 41: 2, 700: 32, 1024: 64, 10**9: 64}
    assert {n: streams_of_documents(n) for n in documents} == documents


def test_row_groups_that_fill_the_memory_have_few_streams(tmp_path, monkeypatch):
    source = make_source("parquet", tmp_path, TEXTS * 8)  # 83 groups, 328 documents
    assert source.num_streams() == 16
    files = tmp_path.glob("*.parquet")
    metas = [pq.read_metadata(file) for file in files]
    groups = [meta.row_group(n).total_byte_size for meta in metas for n in range(82 // 3)]
    for fit, streams in ((9, 8), (3, 2), (0.5, 1)):
        monkeypatch.setattr(row_groups, "POOL_BYTES", int(fit * sum(groups) / len(groups)))
        assert source.num_streams() == streams


def test_another_number_of_streams_is_another_order_and_no_position_in_this_one(tmp_path):
    source = make_source("plain", tmp_path)
    state = Run(source).state()
    sentence = "training.dataset_lanes = 3, and this run has 4; resume with 3"
    with pytest.raises(UserError, match=sentence):
        Run(source, num_streams=4, state=state)


def test_a_position_of_other_readers_is_damaged(tmp_path):
    source = make_source("plain", tmp_path)
    run = Run(source)
    run.take(4)
    state = run.state()
    del state["lanes"]["1"]["carry"]
    with pytest.raises(UserError, match="position is damaged .*stream 1 has "):
        Run(source, state=state)


@pytest.mark.parametrize(
    ("rank_slice", "line"),
    [
        (RankSlice(0, 8), None),
        (
            RankSlice(0, 128),
            "128 processes read 64 streams.* 2.0 times.*a new run .*dataset_lanes = 128",
        ),
        (
            RankSlice(0, 3),
            "3 processes read 64 streams.* 3.0 times.*a new run .*dataset_lanes = 63",
        ),
        (RankSlice(0, 2, batch_size=3, num_workers=2), "4 processes .* 2.0 .*dataset_lanes = 60"),
    ],
)
def test_a_layout_that_reads_streams_twice_is_told_which_number_does_not(rank_slice, line, log):
    report_streams("Data mine", 64, rank_slice)
    assert log[0] == "Data mine: read as 64 streams (training.dataset_lanes)"
    if line is None:
        assert len(log) == 1
    else:
        assert re.search(line, log[1])
        assert log[1].endswith("a run that resumes from a checkpoint keeps its streams")
        good = int(line.rpartition(" ")[2])
        assert rank_slice.times_made(good) == 1


def test_only_the_first_rank_tells_that_streams_are_read_twice(log):
    report_streams("Data mine", 64, RankSlice(1, 128))
    assert len(log) == 1


def test_streams_that_no_key_changes_are_no_warning(log, caplog):
    with caplog.at_level("INFO", logger="torchtitan"):
        report_streams("Validation data mine", 64, RankSlice(0, 128), settable=False)
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_shipped_chat_run_tokenizes_no_conversation_twice(processes):
    training = ConfigManager().parse_args([f"--job.config_file={CHAT}"]).training
    rank_slice = RankSlice(0, processes, training.local_batch_size, training.dataset_num_workers)
    assert rank_slice.times_made(training.dataset_lanes) == 1


def test_no_number_of_streams_is_advised_that_the_data_has_not(tmp_path, log):
    source = make_source("plain", tmp_path)  # 41 documents
    log.clear()
    report_streams("Data mine", 2, RankSlice(0, 64), [source])
    assert "64 processes read 2 streams" in log[1] and "a new run" not in log[1]
    report_streams("Data mine", 2, RankSlice(0, 3), [source])
    assert "a new run avoids it with training.dataset_lanes = 3;" in log[3]


def test_one_bad_file_of_a_stream_is_no_reason_to_stop_and_bad_data_is(tmp_path, jsonl):
    """Its documents come in another stream in the next epoch; ten epochs in a row are too many."""
    source = opened("mine", str(jsonl("a.jsonl", ["good"] * 3 + [""])), "text")
    run = Run(source, num_streams=4)
    assert len(run.take(200)) == 200 and run.state()["skipped_documents"] > 10
    source = opened("mine", str(jsonl("b.jsonl", ["good"] + [""] * 99)), "text")
    with pytest.raises(UserError, match="'mine' had no usable document for stream . of 4 in 10"):
        Run(source, num_streams=4).take(200)
