"""A lane: documents packed into one stream of tokens, cut into windows.

The stream is `bos document eos bos document eos ...`, epoch after epoch. A window of seq_len + 1
tokens becomes input = window[:-1] and labels = window[1:]; the next window starts on the last token
of this one, so every token of the lane but the very first is a label exactly once.
"""

from torchtitan.data.documents import Skips
from torchtitan.data.sources import Reader, Shard, Source
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# Where a lane starts. `taken` counts its windows, `reader` is the position of the current document
# (None: of the first one of the epoch), `token` how many of its tokens are read, `carry` the last
# token of the last window.
START = {"taken": 0, "epoch": 0, "reader": None, "token": 0, "carry": []}

# A lane may have bad luck with its part of an epoch (one damaged file); in this many epochs in a
# row it would be the data.
MOST_EMPTY_EPOCHS = 10


class Lane:
    """The windows of one shard of the source, from a position on.

    `skips` is shared by the lanes of a process; `skipped` counts the documents passed over for the
    last window alone.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        shard: Shard,
        skips: Skips,
        *,
        seq_len: int,
        seed: int,
        infinite: bool,
        position: dict,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._shard = shard
        self._skips = skips
        self._seq_len = seq_len
        self._seed = seed
        self._infinite = infinite
        self.skipped = 0
        self._taken: int = position["taken"]
        self._carry: list[int] = position["carry"]
        self._tokens: list[int] = []
        self._token = 0
        self._open_epoch(position["epoch"])
        if position["reader"] is not None:  # in the middle of a document: read it again
            self._reader.load_state_dict(position["reader"])
            self._next_document()
            self._token = position["token"]

    def window(self, number: int) -> list[int] | None:
        """Window `number` (they are asked for in order; others between belong to other processes).

        Full, but for the last of finite data; None behind that.
        """
        assert number >= self._taken, (number, self._taken)
        while self._taken <= number:
            self.skipped = 0
            window = self._carry + self._take(self._seq_len + 1 - len(self._carry))
            if len(window) < 2:  # nothing left that could be a label
                return None
            self._taken += 1
            self._carry = window[-1:]
        return window

    def position(self) -> dict:
        """Behind the last window."""
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
        self._reader: Reader = self._source.open(self._seed, epoch, self._shard)

    def _report_epoch(self) -> None:
        """Of the first lane alone: the others are about as far."""
        if self._shard.index == 0:
            name, number, lanes = self._source.name, self._epoch + 1, self._shard.count
            logger.info(f"Data {name}: epoch {number} of its documents begins (lane 1 of {lanes})")

    def _next_document(self) -> bool:
        """Tokenise the next usable document; False at the end of finite data."""
        ends = 0
        while True:
            start = self._reader.state_dict()
            record = next(self._reader, None)
            if record is None:
                if not self._infinite:
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
        lane, lanes = self._shard.index + 1, self._shard.count
        way_out = "lower training.dataset_lanes" if lanes > 1 else "mend those it has"
        return UserError(
            f"training.dataset '{self._source.name}' had no usable document for lane {lane} of "
            f"{lanes} in {MOST_EMPTY_EPOCHS} epochs (skipped by this process: "
            f"{self._skips or 'none'}); give it more documents, or {way_out}."
        )
