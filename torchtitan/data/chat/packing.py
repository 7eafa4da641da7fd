"""A stream of conversations: each one whole, as many in a sequence as fit.

A sequence begins with the conversation that has waited longest. Then, of those read ahead
(`chat.look_ahead`), it takes the longest that fits into what is left, until none does. Which
conversations share a sequence depends on the stream alone, not on layout or workers.

The last token of a conversation predicts nothing, so it is no input: n tokens take n − 1 places.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.chat.renderer import ChatExample
from torchtitan.data.documents import Record, Skips
from torchtitan.data.epochs import Epochs
from torchtitan.data.packing import Packed
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Shard, Source
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.errors import UserError

# Position at which a stream starts. `taken` counts its sequences; `epoch` and `reader` are the
# position of the oldest record of which an example waits, `read` the number of records read from
# there on, and `used` the numbers of their examples that no longer wait.
START = {"taken": 0, "epoch": 0, "reader": None, "read": 0, "used": []}


@dataclass
class _Read:
    """A record that was read.

    position: of the record
    waiting: its examples; None where one no longer waits
    """

    position: dict
    waiting: list[ChatExample | None]


class ConversationStream:
    """Sequences of one shard of a source of conversations, from a position on.

    source: conversations
    render: a row's examples; raises ChatProblem
    shard: the part of the source that forms this stream
    skips: count of skipped conversations, shared by the streams of a process
    settings: how they are cut
    position: where to begin; `START`, or what `position()` gave
    """

    dataset: str | None = None  # the name is known to blends only

    def __init__(
        self,
        source: Source,
        render: Callable[[Mapping], list[ChatExample]],
        shard: Shard,
        skips: Skips,
        settings: DataSettings,
        position: dict,
    ) -> None:
        self._render, self._skips, self._settings = render, skips, settings
        table = source.settings.key.partition(".")[0]  # datasets of a blend have no length
        self._key = f"{table}.seq_len"
        self.skipped = 0  # conversations passed over for the last sequence alone
        self._taken: int = position["taken"]
        self._window: deque[_Read] = deque()
        self._count = 0  # examples that wait
        epoch, reader = position["epoch"], position["reader"]
        self._records = Epochs(source, shard, settings, skips, epoch, reader)
        self._restore(position["read"], set(position["used"]))

    def sequence(self, number: int) -> Packed | None:
        """Sequence `number`; None at the end of finite data.

        number: at least the last one + 1; sequences between are made and dropped, as they belong
            to other processes
        """
        assert number >= self._taken, (number, self._taken)
        while self._taken <= number:
            self.skipped = 0
            while self._count < self._settings.chat.look_ahead and self._read():
                pass
            if not self._count:
                return None
            packed = _join(self._choose())
            self._taken += 1
        return packed

    def position(self) -> dict:
        """Position behind the last sequence."""
        waiting = [example for read in self._window for example in read.waiting]
        used = [number for number, example in enumerate(waiting) if example is None]
        oldest = self._window[0].position if self._window else self._records.position()
        return {"taken": self._taken, **oldest, "read": len(self._window), "used": used}

    def _restore(self, records: int, used: set[int]) -> None:
        """Read again what was read before, without counting the skipped again."""
        skips, self._skips = self._skips, Skips(quiet=True)
        for _ in range(records):
            self._read()
        self._skips, self.skipped = skips, 0
        numbered = [(read, n) for read in self._window for n in range(len(read.waiting))]
        for number, (read, n) in enumerate(numbered):
            if number in used and read.waiting[n] is not None:
                read.waiting[n] = None
                self._count -= 1

    def _read(self) -> bool:
        """Read a record into the window; False at the end of finite data."""
        found = self._records.next()
        if found is None:
            return False
        position, record = found
        waiting = self._examples(record)
        usable = sum(example is not None for example in waiting)
        if usable:
            self._records.found_usable()
        self._count += usable
        self._window.append(_Read(position, waiting))
        self._drop_used()
        return True

    def _drop_used(self) -> None:
        """Let the window begin with a record of which an example waits."""
        while self._window and not any(self._window[0].waiting):
            self._window.popleft()

    def _examples(self, record: Record) -> list[ChatExample | None]:
        """Render a record; None for each example that can't be used."""
        examples: list[ChatExample] = []
        if not record.problem:
            assert record.row is not None, record
            try:
                examples = self._render(record.row)
            except ChatProblem as error:
                record = Record(record.where, problem=error.problem, found=error.found)
        if record.problem:
            self._skip(record)
        return [self._fitted(record, example) for example in examples]

    def _skip(self, record: Record) -> None:
        self._skips.add(record)
        self.skipped += 1

    def _fitted(self, record: Record, example: ChatExample) -> ChatExample | None:
        """The example where it fits into a sequence; else as `chat.too_long` says."""
        most, length = self._settings.seq_len + 1, len(example.tokens)
        if length <= most:
            return example
        if self._settings.chat.too_long == "refuse":
            raise UserError(
                f"{record.where}: the conversation has {length:,} tokens, more than the "
                f"{most:,} of {self._key} = {most - 1:,} and its last label; raise it, or set "
                'chat.too_long to "drop" or "cut".'
            )
        cut = None
        if self._settings.chat.too_long == "cut":
            cut = _cut_behind_answer(example, most)
        if cut is None:
            self._skip(Record(record.where, problem="longer than a sequence"))
        return cut

    def _choose(self) -> list[ChatExample]:
        """Take examples for a sequence from the window."""
        chosen: list[ChatExample] = []
        room = self._settings.seq_len
        while place := self._place(room, oldest=not chosen):
            read, n = place
            example = read.waiting[n]
            assert example is not None
            read.waiting[n] = None
            self._count -= 1
            chosen.append(example)
            room -= len(example.tokens) - 1
        self._drop_used()
        return chosen

    def _place(self, room: int, *, oldest: bool) -> tuple[_Read, int] | None:
        """Find the longest example of at most `room` places, or the oldest one."""
        fitting = [
            (size, (read, n))
            for read in self._window
            for n, example in enumerate(read.waiting)
            if example is not None and (size := len(example.tokens) - 1) <= room
        ]
        if not fitting:
            return None
        return fitting[0][1] if oldest else max(fitting, key=lambda pair: pair[0])[1]


def _join(examples: list[ChatExample]) -> Packed:
    inputs: list[int] = []
    labels: list[int] = []
    documents: list[int] = []
    for number, example in enumerate(examples):
        tokens, trained = example.tokens, example.trained
        inputs += tokens[:-1]
        pairs = zip(tokens[1:], trained[1:], strict=True)
        labels += [token if train else IGNORE_INDEX for token, train in pairs]
        documents += [number] * (len(tokens) - 1)
    return Packed(inputs, labels, documents)


def _cut_behind_answer(example: ChatExample, most: int) -> ChatExample | None:
    """Cut to at most `most` tokens, behind the last whole answer; None where none is left."""
    trained = example.trained
    for end in range(most, 0, -1):
        if trained[end - 1] and not trained[end]:
            return ChatExample(example.tokens[:end], trained[:end])
    return None


def check_start(index: int, position: dict) -> None:
    """Raise ValueError where `position` has other keys than a position of stream `index`."""
    if position.keys() != START.keys():
        raise ValueError(f"stream {index} has {sorted(position)}")
