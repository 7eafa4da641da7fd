"""A stream: documents packed one behind the other, cut into sequences.

The tokens are `bos document eos bos document eos ...`, epoch after epoch. A sequence of seq_len + 1
tokens becomes input = sequence[:-1] and labels = sequence[1:]; the next one starts on the last
token of this one, so every token of the stream but the very first is a label exactly once.
"""

from typing import NamedTuple

from torchtitan.data.documents import Skips
from torchtitan.data.epochs import Epochs
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Shard, Source
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError

# Position at which a stream starts. `taken` counts its sequences, `reader` is the position of the
# current document (None: of the first one of the epoch), `token` how many of its tokens are read,
# `carry` the last token of the last sequence.
START = {"taken": 0, "epoch": 0, "reader": None, "token": 0, "carry": []}
# Documents in a row. Then no text will have a token, and the search for one would never end.
MOST_WITHOUT_TOKEN = 10_000


class Packed(NamedTuple):
    """An example without its padding.

    inputs, labels: token ids of equal number; a label may be `IGNORE_INDEX`
    documents: number of each token's conversation in the example; None = documents of text, which
        end with the end-of-text token
    """

    inputs: list[int]
    labels: list[int]
    documents: list[int] | None = None


class PackedStream:
    """Sequences of one shard of a source, from a position on.

    source: documents
    tokenizer: text to token ids
    shard: the part of the source's documents that form this stream
    skips: count of skipped documents, shared by the streams of a process
    settings: how they are cut; a sequence has seq_len + 1 tokens
    position: where to begin; `START`, or what `position()` gave
    """

    dataset: str | None = None  # the name is known to blends only

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        shard: Shard,
        skips: Skips,
        settings: DataSettings,
        position: dict,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips = skips
        self._settings = settings
        self.skipped = 0  # documents passed over for the last sequence alone
        self._taken: int = position["taken"]
        self._carry: list[int] = position["carry"]
        self._tokens: list[int] = []
        self._token = 0
        self._without_token = 0  # documents in a row
        epoch, reader = position["epoch"], position["reader"]
        self._records = Epochs(source, shard, settings, skips, epoch, reader)
        self._document = {"epoch": epoch, "reader": reader}
        if reader is not None:  # in the middle of a document: read it again
            self._next_document()
            self._token = position["token"]

    def sequence(self, number: int) -> Packed | None:
        """Sequence `number`: seq_len labels, fewer at the end of finite data, then None.

        number: at least the last one + 1; sequences between are made and dropped, as they belong
            to other processes
        """
        assert number >= self._taken, (number, self._taken)
        while self._taken <= number:
            self.skipped = 0
            sequence = self._carry + self._take(self._settings.seq_len + 1 - len(self._carry))
            if len(sequence) < 2:  # nothing left that could be a label
                return None
            self._taken += 1
            self._carry = sequence[-1:]
        return Packed(sequence[:-1], sequence[1:])

    def position(self) -> dict:
        """Position behind the last sequence."""
        return {
            "taken": self._taken,
            **self._document,
            "token": self._token,
            "carry": self._carry,
        }

    def _take(self, count: int) -> list[int]:
        """The next `count` tokens; fewer only where the data ends."""
        taken: list[int] = []
        while len(taken) < count:
            if self._token >= len(self._tokens) and not self._next_document():
                break
            piece = self._tokens[self._token : self._token + count - len(taken)]
            self._token += len(piece)
            taken += piece
        return taken

    def _next_document(self) -> bool:
        """Tokenise the next usable document; False at the end of finite data."""
        while True:
            found = self._records.next()
            if found is None:
                return False
            self._document, record = found
            if not record.problem:
                break
            self._skips.add(record)
            self.skipped += 1
        self._records.found_usable()
        self._tokens = self._tokenizer.encode(
            record.text,
            add_bos=self._tokenizer.bos_id is not None,
            add_eos=self._tokenizer.eos_id is not None,
        )
        self._token = 0
        self._without_token = 0 if self._tokens else self._without_token + 1
        if self._without_token >= MOST_WITHOUT_TOKEN:
            raise UserError(
                f"the tokenizer gives no token for {self._without_token:,} documents in a row (the "
                f"last: {record.where}, {record.text[:40]!a}), and names no begin or end token; "
                "set model.hf_assets_path to a tokenizer of these texts."
            )
        return True


def check_start(index: int, position: dict) -> None:
    """Raise ValueError where `position` has other keys than a position of stream `index`."""
    if position.keys() != START.keys():
        raise ValueError(f"stream {index} has {sorted(position)}")
