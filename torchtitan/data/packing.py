"""A stream: documents packed one behind the other, cut into sequences.

The tokens are `bos document eos bos document eos ...`, epoch after epoch. A sequence of seq_len + 1
tokens becomes input = sequence[:-1] and labels = sequence[1:]; the next one starts on the last
token of this one, so every token of the stream but the very first is a label exactly once.
"""

from torchtitan.data.documents import Skips
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Reader, Shard, Source
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# Position at which a stream starts. `taken` counts its sequences, `reader` is the position of the
# current document (None: of the first one of the epoch), `token` how many of its tokens are read,
# `carry` the last token of the last sequence.
START = {"taken": 0, "epoch": 0, "reader": None, "token": 0, "carry": []}

# A stream may have bad luck with its part of an epoch (one damaged file); in this many epochs in a
# row it would be the data.
MOST_EMPTY_EPOCHS = 10


class PackedStream:
    """Sequences of one shard of a source, from a position on.

    source: documents
    tokenizer: text to token ids
    shard: the part of the source's documents that form this stream
    skips: count of skipped documents, shared by the streams of a process
    settings: how they are cut; a sequence has seq_len + 1 tokens
    position: where to begin; `START`, or what `position()` gave
    """

    dataset = None  # the name is known to blends only

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        shard: Shard,
        skips: Skips,
        settings: DataSettings,
        position: dict,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._shard = shard
        self._skips = skips
        self._settings = settings
        self.skipped = 0  # documents passed over for the last sequence alone
        self._taken: int = position["taken"]
        self._carry: list[int] = position["carry"]
        self._tokens: list[int] = []
        self._token = 0
        self._open_epoch(position["epoch"])
        if position["reader"] is not None:  # in the middle of a document: read it again
            self._reader.load_state_dict(position["reader"])
            self._next_document()
            self._token = position["token"]

    def sequence(self, number: int) -> list[int] | None:
        """Token ids of sequence `number`: seq_len + 1, fewer at the end of finite data, then None.

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
        return sequence

    def position(self) -> dict:
        """Position behind the last sequence."""
        return {
            "taken": self._taken,
            "epoch": self._epoch,
            "reader": self._document_start,
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

    def _open_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._document_start: dict | None = None
        self._reader: Reader = self._source.open(self._settings.seed, epoch, self._shard)

    def _report_epoch(self) -> None:
        """Log a new epoch, for the first stream alone: the others are about as far."""
        if self._shard.index == 0:
            name, number, count = self._source.name, self._epoch + 1, self._shard.count
            logger.info(
                f"Data {name}: epoch {number} of its documents begins (stream 1 of {count})"
            )

    def _next_document(self) -> bool:
        """Tokenise the next usable document; False at the end of finite data."""
        ends = 0
        while True:
            start = self._reader.state_dict()
            record = next(self._reader, None)
            if record is None:
                if not self._settings.infinite:
                    return False
                ends += 1
                if ends > MOST_EMPTY_EPOCHS:  # the first end is that of an epoch with documents
                    raise self._empty()
                self._open_epoch(self._epoch + 1)
                self._report_epoch()
            elif record.problem:
                self._skips.add(record)
                self.skipped += 1
            else:
                break
        self._tokens = self._tokenizer.encode(
            record.text,
            add_bos=self._tokenizer.bos_id is not None,
            add_eos=self._tokenizer.eos_id is not None,
        )
        self._token, self._document_start = 0, start
        return True

    def _empty(self) -> UserError:
        number, count = self._shard.index + 1, self._shard.count
        way_out = "lower training.dataset_lanes" if count > 1 else "mend those it has"
        dataset = self._source.settings.toml_key("dataset")
        return UserError(
            f"{dataset} '{self._source.name}' had no usable document for stream {number} of "
            f"{count} in {MOST_EMPTY_EPOCHS} epochs (skipped by this process: "
            f"{self._skips or 'none'}); give it more documents, or {way_out}."
        )


def check_start(index: int, position: dict) -> None:
    """Raise ValueError where `position` has other keys than a position of stream `index`."""
    if position.keys() != START.keys():
        raise ValueError(f"stream {index} has {sorted(position)}")
