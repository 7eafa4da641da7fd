"""Records of one shard of a source, epoch after epoch."""

from torchtitan.data.documents import Record, Skips
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Shard, Source
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# A stream may have bad luck with its part of an epoch (one damaged file); in this many epochs in a
# row it would be the data.
MOST_EMPTY_EPOCHS = 10


class Epochs:
    """Reads records from a position on, without end where `settings.infinite`.

    epoch, reader: where to begin, as `position()` gave them; reader None = the epoch's first record
    skips: count of skipped documents, for the error about data without usable ones
    """

    def __init__(
        self,
        source: Source,
        shard: Shard,
        settings: DataSettings,
        skips: Skips,
        epoch: int,
        reader: dict | None,
    ) -> None:
        self._source, self._shard, self._settings = source, shard, settings
        self._skips = skips
        self._ends = 0  # of epochs since the last usable document
        self._open(epoch)
        if reader is not None:
            self._reader.load_state_dict(reader)

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        self._reader = self._source.open(self._settings.seed, epoch, self._shard)

    def position(self) -> dict:
        """Position of the next record."""
        return {"epoch": self._epoch, "reader": self._reader.state_dict()}

    def next(self) -> tuple[dict, Record] | None:
        """Read a record; return its position, too. None at the end of finite data."""
        while True:
            position = self.position()
            record = next(self._reader, None)
            if record is not None:
                return position, record
            if not self._settings.infinite:
                return None
            self._ends += 1
            if self._ends > MOST_EMPTY_EPOCHS:  # the first end is that of an epoch with documents
                raise self._empty()
            self._open(self._epoch + 1)
            self._report()

    def found_usable(self) -> None:
        """Note that the last record could be used."""
        self._ends = 0

    def _report(self) -> None:
        """Log a new epoch, for the first stream alone: the others are about as far. Of many epochs
        (a small set for fine-tuning) each second, fourth, eighth, ... one is logged."""
        name, number, count = self._source.name, self._epoch + 1, self._shard.count
        if self._shard.index == 0 and number & (number - 1) == 0:
            logger.info(
                f"Data {name}: epoch {number} of its documents begins (stream 1 of {count})"
            )

    def _empty(self) -> UserError:
        number, count = self._shard.index + 1, self._shard.count
        way_out = "lower training.dataset_lanes" if count > 1 else "mend those it has"
        dataset = self._source.settings.toml_key("dataset")
        return UserError(
            f"{dataset} '{self._source.name}' had no usable document for stream {number} of "
            f"{count} in {MOST_EMPTY_EPOCHS} epochs (skipped by this process: "
            f"{self._skips or 'none'}); give it more documents, or {way_out}."
        )
