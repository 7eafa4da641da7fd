"""Conversations in sequences: each whole and once an epoch, in full sequences, resumed exactly."""

import json
import random

import pytest

from torchtitan.config import Chat
from torchtitan.data import DatasetSettings, DataSettings, open_source
from torchtitan.data.chat import ChatExample, ChatProblem
from torchtitan.data.chat.packing import START, ConversationStream
from torchtitan.data.documents import Skips
from torchtitan.data.sources import Shard
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.errors import UserError

SEQ_LEN = 1024


def lengths_of(count: int, seed: int = 0) -> list[int]:
    """Tokens of conversations as chat sets have them: most are short, a few fill a sequence."""
    draw = random.Random(seed)
    return [max(2, min(SEQ_LEN + 1, int(draw.lognormvariate(5.3, 0.9)))) for _ in range(count)]


def write(path, lengths: list[int]):
    """Rows whose user says their number and their length."""
    rows = [
        {"messages": [said("user", f"{n} {length}"), said("assistant", "yes")]}
        for n, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def render(row) -> list[ChatExample]:
    """Conversation n of a length: n, then ones, of which the second half is trained."""
    number, length = map(int, row["messages"][0]["content"].split())
    if length == 0:
        raise ChatProblem("nothing trained")
    return [ChatExample([number] + [1] * (length - 1), [n >= length // 2 for n in range(length)])]


def make_source(path):
    return open_source(DatasetSettings("training.blend.talk", "text", str(path), format="chat"))


def make_stream(path, position=None, *, skips=None, infinite=True, render=render, **chat):
    source = make_source(path)
    settings = DataSettings(
        (source.settings,), False, SEQ_LEN, 1, infinite=infinite, chat=Chat(**chat)
    )
    skips = Skips() if skips is None else skips
    return ConversationStream(source, render, Shard(), skips, settings, position or START)


def sequences(stream: ConversationStream, count: int = 10**6) -> list:
    found, first = [], stream.position()["taken"]
    for n in range(first, first + count):
        packed = stream.sequence(n)
        if packed is None:
            break
        found.append(packed)
    return found


def conversations_in(packed) -> list[tuple[int, int]]:
    """(number, inputs) of each conversation, by the borders of `documents`."""
    starts = [n for n, d in enumerate(packed.documents) if n == 0 or packed.documents[n - 1] != d]
    ends = [*starts[1:], len(packed.documents)]
    return [(packed.inputs[a], b - a) for a, b in zip(starts, ends, strict=True)]


def test_each_conversation_is_there_whole_and_once(tmp_path):
    lengths = lengths_of(300)
    packed = sequences(make_stream(write(tmp_path / "rows.jsonl", lengths), infinite=False))
    found = sorted(pair for each in packed for pair in conversations_in(each))
    assert found == [(n, length - 1) for n, length in enumerate(lengths)]
    assert all(len(each.inputs) == len(each.labels) <= SEQ_LEN for each in packed)
    labels = sum(label != IGNORE_INDEX for each in packed for label in each.labels)
    assert labels == sum(length - max(1, length // 2) for length in lengths)


def test_labels_are_shifted_inside_of_a_conversation_and_its_last_token_predicts_nothing(tmp_path):
    path = write(tmp_path / "rows.jsonl", [3, 4])
    spelled = {0: ([10, 11, 12], [False, False, True]), 1: ([20, 21, 22, 23], [False, True] * 2)}

    def spell(row):
        return [ChatExample(*spelled[int(row["messages"][0]["content"].split()[0])])]

    (packed,) = sequences(make_stream(path, infinite=False, render=spell))
    labels_of = dict(zip(packed.inputs, packed.labels, strict=True))
    assert labels_of == {10: -100, 11: 12, 20: 21, 21: -100, 22: 23}
    assert packed.documents in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_sequences_are_97_percent_full(tmp_path):
    packed = sequences(make_stream(write(tmp_path / "rows.jsonl", lengths_of(4000))), 500)
    filled = sum(len(each.inputs) for each in packed) / (len(packed) * SEQ_LEN)
    print(f"{100 * filled:.2f} % full")
    assert filled >= 0.97


def test_no_conversation_waits_for_ever(tmp_path):
    """One that is hard to fit begins a sequence once it is the oldest that was read."""
    path = write(tmp_path / "rows.jsonl", [SEQ_LEN + 1] + [200] * 400)
    packed = sequences(make_stream(path, infinite=False, look_ahead=16))
    given = [n for each in packed for n, _ in conversations_in(each)]
    rows = [record.row for record in make_source(path).open(0, 0, Shard())]
    order = [int(row["messages"][0]["content"].split()[0]) for row in rows if row]
    assert given.index(0) - order.index(0) < 16


@pytest.mark.parametrize("behind", [1, 7, 40])
def test_a_stream_resumes_with_the_same_sequences(behind, tmp_path):
    """Across epochs, also where conversations that can't be used lie in the window."""
    lengths = lengths_of(60)
    lengths[7] = lengths[31] = 0
    path = write(tmp_path / "rows.jsonl", lengths)
    first = make_stream(path, look_ahead=24)
    sequences(first, behind)
    position = json.loads(json.dumps(first.position()))
    again = make_stream(path, position, look_ahead=24)
    assert again.position() == first.position()
    made = [
        [(stream.sequence(n), stream.skipped) for n in range(behind, behind + 30)]
        for stream in (first, again)
    ]
    assert made[0] == made[1] and sum(skipped for _, skipped in made[0])
    assert again.position() == first.position()


def test_too_long_conversations_are_dropped_with_a_count(tmp_path):
    skips = Skips()
    path = write(tmp_path / "rows.jsonl", [5, SEQ_LEN + 2, 6])
    (packed,) = sequences(make_stream(path, infinite=False, skips=skips))
    assert sorted(conversations_in(packed)) == [(0, 4), (2, 5)]
    assert dict(skips.counts) == {"longer than a sequence": 1}


def test_too_long_conversations_are_cut_behind_an_answer(tmp_path):
    path = write(tmp_path / "rows.jsonl", [2000])
    answers = [False] * 100 + [True] * 50 + [False] * 100 + [True] * 50 + [False] * 900 + [True]

    def three_answers(row):
        return [ChatExample(list(range(len(answers))), answers)]

    stream = make_stream(path, infinite=False, render=three_answers, too_long="cut")
    (packed,) = sequences(stream)
    assert packed.labels[-1] == 299 and packed.inputs == list(range(299))


def test_too_long_conversations_end_the_run_where_asked(tmp_path):
    path = write(tmp_path / "rows.jsonl", [5, 2000])
    with pytest.raises(
        UserError,
        match=r"rows.jsonl line 2: the conversation has 2,000 tokens, more than the 1,025 of "
        r"training.seq_len = 1,024 and its last label; raise it, or set chat.too_long to",
    ):
        sequences(make_stream(path, infinite=False, too_long="refuse"))


def test_data_without_a_usable_conversation_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [0, 0])
    with pytest.raises(UserError, match=r"no usable document .* nothing trained"):
        sequences(make_stream(path))
