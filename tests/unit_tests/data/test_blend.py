"""A blend: shares as told, also by phase; and one order of examples, whatever the layout."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import pytest

from tests.tiny_run import as_option, losses, records, tiny
from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from tests.unit_tests.data.kinds import lists, opened, pack, text_dataset
from torchtitan.config.blend import BlendSegment
from torchtitan.data.blend import BlendedDataset, BlendOrder, period_of
from torchtitan.data.dataloader import build_dataloader, merge_states
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.sources import Shard
from torchtitan.tools.errors import UserError
from torchtitan.train import main

SEQ_LEN, STREAMS, SEED = 20, 3, 1
PARTS = [(1, 1), (7, 3), (99, 1), (1, 1, 1), (501, 300, 199), (64, 32, 16, 8, 4, 2, 1), (5,)]

# ---------------------------------------------------------------------------------------------
# Whose turn it is
# ---------------------------------------------------------------------------------------------


def furthest_from_share(turns, parts):
    """Over all beginnings, in sequences."""
    had, furthest = [0] * len(parts), Fraction(0)
    for m, turn in enumerate(turns, start=1):
        had[turn] += 1
        due = (Fraction(part * m, sum(parts)) for part in parts)
        furthest = max(furthest, *(abs(h - d) for h, d in zip(had, due, strict=True)))
    return furthest


@pytest.mark.parametrize("parts", PARTS)
def test_a_period_keeps_the_shares_within_one_sequence(parts):
    period = period_of(parts)
    assert Counter(period) == dict(enumerate(parts))
    assert furthest_from_share(period, parts) < 1


@pytest.mark.parametrize("parts", PARTS)
def test_realised_shares_are_the_weights(parts):
    turns, length = BlendOrder([BlendSegment(0, parts)]), sum(parts)
    first = [turns[n] for n in range(3 * length)]
    assert Counter(first) == {k: 3 * part for k, part in enumerate(parts)}
    assert furthest_from_share(first, parts) < (1 if len(parts) <= 2 else 2)


@pytest.mark.parametrize("parts", [(1, 1), (501, 300, 199), (15, 1)])
def test_every_stream_gets_every_dataset(parts):
    """Although periods and 16 streams have common divisors: each one's share is near the whole."""
    turns, streams, rows = BlendOrder([BlendSegment(0, parts)]), 16, 1500
    for stream in range(streams):
        seen = Counter(turns[row * streams + stream] for row in range(rows))
        for k, part in enumerate(parts):
            assert seen[k] == pytest.approx(rows * part / sum(parts), rel=0.15)


def test_phases_have_shares_of_their_own():
    """Each counted from its first sequence on; no memory of what came before it."""
    segments = [
        BlendSegment(0, (7, 2, 1)),
        BlendSegment(33, (0, 1, 1)),
        BlendSegment(90, (1, 0, 0)),
    ]
    turns = BlendOrder(segments)
    ends = [33, 90, 120]
    for segment, end in zip(segments, ends, strict=True):
        seen = [turns[n] for n in range(segment.first, end)]
        assert furthest_from_share(seen, segment.parts) < 2
    assert {turns[n] for n in range(33, 90)} == {1, 2}


# ---------------------------------------------------------------------------------------------
# The examples
# ---------------------------------------------------------------------------------------------

WEB = [f"web {n} " + "word " * (n % 13) for n in range(40)]
CODE = [f"code {n} = " + "x + " * (n % 7) for n in range(9)]  # two epochs in what is read here
MATH = [f"math {n}" for n in range(30)]
TEXTS = {"web": WEB, "code": CODE, "math": MATH}
# Math rests in the second phase.
SEGMENTS = [BlendSegment(0, (6, 3, 1)), BlendSegment(41, (1, 1, 0))]


@pytest.fixture
def sources(jsonl):
    paths = {name: jsonl(f"{name}.jsonl", texts) for name, texts in TEXTS.items()}
    return {name: opened("text", str(path), "text", name) for name, path in paths.items()}


def blend(sources, rank_slice=RankSlice(), segments=SEGMENTS, seed=SEED):  # noqa: B008 - it is frozen
    settings = dict(rank_slice=rank_slice, num_streams=STREAMS, seed=seed)
    parts = {n: text_dataset(s, OneTokenAByte(), SEQ_LEN, **settings) for n, s in sources.items()}
    return build_dataloader(BlendedDataset(parts, BlendOrder(segments)))


def expected_order(sources, count):
    """Example n is of stream n % STREAMS: the next window there of the dataset whose turn it is."""
    turns = BlendOrder(SEGMENTS)
    windows = {}
    for name, source in sources.items():
        for stream in range(STREAMS):
            epochs = (source.open(SEED, epoch, Shard(stream, STREAMS)) for epoch in range(9))
            texts = [record.text for epoch in epochs for record in epoch]
            windows[name, stream] = iter(pack(texts, OneTokenAByte(), SEQ_LEN)[:-1])
    names = list(sources)
    found = [next(windows[names[turns[n]], n % STREAMS]) for n in range(count)]
    return [(tuple(inputs), tuple(labels)) for inputs, labels in found]


def take(loaders, batches):
    """The examples of so many batches of all ranks."""
    found = [batch for loader in loaders for batch in itertools.islice(loader, batches)]
    pairs = (zip(inputs, labels, strict=True) for inputs, labels in lists(found))
    return [(tuple(inputs), tuple(labels)) for batch in pairs for inputs, labels in batch]


CHAIN = [
    # batches, ranks, batch size, workers; the second phase begins in the third part
    (5, 3, 1, 0),
    (2, 2, 2, 0),
    (3, 1, 5, 2),
    (2, 4, 1, 0),
    (2, 2, 3, 0),
    (5, 2, 4, 0),
]


def test_a_chain_of_layouts_is_one_run(sources):
    """All ranks together see the one order, part by part, however many ranks and workers."""
    order, state, seen = expected_order(sources, 110), None, 0
    for batches, dp_degree, batch_size, workers in CHAIN:
        slices = [RankSlice(rank, dp_degree, batch_size, workers) for rank in range(dp_degree)]
        loaders = [blend(sources, rank_slice) for rank_slice in slices]
        for loader in loaders if state else []:
            loader.load_state_dict(json.loads(json.dumps(state)))
        part = take(loaders, batches)
        assert len(part) == batches * dp_degree * batch_size
        assert Counter(part) == Counter(order[seen : seen + len(part)])
        seen += len(part)
        state = merge_states([loader.local_state() for loader in loaders])
        assert state["consumed"] == seen
    alone = blend(sources)
    take([alone], seen)
    assert state == merge_states([alone.local_state()])
    assert max(stream["datasets"]["code"]["epoch"] for stream in state["lanes"].values()) >= 1


def test_each_document_of_a_stream_is_seen_before_any_is_seen_again(sources):
    """Decoded from the labels, by stream and dataset."""
    loader = blend(sources)
    texts = {}
    for n, (_, labels) in enumerate(take([loader], 90)):
        texts.setdefault((turn := BlendOrder(SEGMENTS)[n], n % STREAMS), []).extend(labels)
        assert turn in (0, 1) or n < 41
    firsts = {k: [] for k in range(3)}
    for (k, stream), ids in texts.items():
        read = "".join(chr(i) if i < 256 else "\n" * (i == 257) for i in ids).split("\n")[:-1]
        firsts[k] += read[: len(range(stream, len(list(TEXTS.values())[k]), STREAMS))]
    assert sorted(firsts[1]) == sorted(CODE), "each stream's first epoch"
    assert set(firsts[0]) <= set(WEB) and len(set(firsts[0])) == len(firsts[0]) > 20
    assert set(firsts[2]) <= set(MATH) and len(set(firsts[2])) == len(firsts[2]) > 2


def test_the_loader_knows_what_each_dataset_gave(sources):
    loaders = [blend(sources, RankSlice(rank, 2, 2)) for rank in range(2)]
    take(loaders, 10)
    state = merge_states([loader.local_state() for loader in loaders])
    assert state["tokens_of"] == {"web": 24 * SEQ_LEN, "code": 12 * SEQ_LEN, "math": 4 * SEQ_LEN}
    again = [blend(sources, RankSlice(rank, 3)) for rank in range(3)]
    for loader in again:
        loader.load_state_dict(state)
    assert merge_states([loader.local_state() for loader in again]) == state


def test_an_epoch_of_a_dataset_is_told(sources, log):
    take([blend(sources)], 90)
    told = [line for line in log if "epoch" in line]
    assert "Data code: epoch 2 of its documents begins (stream 1 of 3)" in told
    assert not any("web" in line for line in told)


def test_another_blend_goes_on_with_the_same_datasets_and_not_with_others(sources):
    """Weights may change at any restart; each dataset resumes where it was."""
    loader = blend(sources)
    take([loader], 12)
    state = merge_states([loader.local_state()])
    only_code = blend(sources, segments=[BlendSegment(0, (0, 1, 0))])
    only_code.load_state_dict(state)
    batch = next(iter(only_code))
    order, turns = expected_order(sources, 60), BlendOrder(SEGMENTS)
    next_code = next(order[n] for n in range(12, 60, 3) if turns[n] == 1)
    assert tuple(batch[1][0].tolist()) == next_code[1]
    fewer = blend(
        {name: sources[name] for name in ("web", "code")}, segments=[BlendSegment(0, (1, 1))]
    )
    with pytest.raises(UserError, match="training.blend = .'web', 'code', 'math'., and this run"):
        fewer.load_state_dict(state)
    del state["lanes"]["1"]["datasets"]["web"]
    with pytest.raises(UserError, match="position is damaged"):
        blend(sources).load_state_dict(state)


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------

SAVES = ["--checkpoint.enable", "--checkpoint.last_save_model_only=false"]


def run(folder, steps, rows, *options):
    """Without training.dataset, where there are rows."""
    arguments = tiny(folder, training__steps=steps)
    if rows:
        arguments = [a for a in arguments if not a.startswith("--training.dataset=")]
        arguments.append(as_option(rows, "training.blend"))
    return main([*arguments, *SAVES, *options])


def test_one_dataset_alone_is_the_dataset_without_a_blend(tmp_path):
    one = [{"name": "alone", "dataset": "sample", "weight": 1}]
    assert run(tmp_path / "plain", 3, []) == 0
    assert run(tmp_path / "blend", 3, one) == 0
    assert losses(tmp_path / "blend") == losses(tmp_path / "plain")


def test_a_run_goes_on_in_the_middle_of_a_phase_with_the_same_bits(tmp_path, jsonl, capsys):
    """With fill in the middle; the metrics tell the tokens of each dataset."""
    rows = [
        {"name": "sample", "dataset": "sample", "weight": 3},
        {"name": "mine", "dataset_path": str(jsonl("mine.jsonl", WEB)), "weight": 1},
    ]
    phases = [{"tokens": 2 * 128}, {"tokens": 1e6, "blend": {"mine": 1, "sample": 1}}]
    fim = ["--training.fim_rate=0.5", '--training.fim_tokens=["a", "b", "c"]']
    options = [as_option(phases), *fim]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, 6, rows, *options) == 0
    assert run(parts, 3, rows, *options) == 0
    assert run(parts, 6, rows, *options) == 0
    assert losses(parts) == losses(whole)
    given = [record["blend_tokens"] for record in records(whole)]
    assert given == [record["blend_tokens"] for record in records(parts)]
    assert [g["sample"] // 32 for g in given] == [3, 6, 8, 10, 12, 14]
    assert [sum(g.values()) for g in given] == [128 * step for step in range(1, 7)]
    told = capsys.readouterr().err
    assert "Blend: sample 75 %, mine 25 %; from token 256 on sample 50 %, mine 50 %" in told


def test_a_path_that_is_not_there_names_its_dataset(tmp_path, capsys):
    rows = [{"name": "mine", "weight": 1, "dataset_path": "nowhere/*.jsonl"}]
    assert run(tmp_path, 1, rows) == 2
    assert "training.blend.mine.dataset_path" in capsys.readouterr().err
