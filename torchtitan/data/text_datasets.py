"""Text as training examples: the documents of one source, packed into streams."""

from typing import Any

from torchtitan.data.documents import Skips
from torchtitan.data.packing import START, PackedStream, check_start
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Shard, Source
from torchtitan.data.stream_dataset import Stream, StreamDataset
from torchtitan.data.tokenizer import Tokenizer


class TextDataset(StreamDataset):
    """Examples of one source of documents.

    source: documents
    tokenizer: text to token ids
    settings: how the documents are cut; num_streams None lets the source decide
    rank_slice: which examples
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, settings: DataSettings, rank_slice: RankSlice
    ) -> None:
        super().__init__(settings, settings.num_streams or source.num_streams(), rank_slice)
        self.source = source
        self.tokenizer = tokenizer
        self.use_tokens_of(tokenizer)
        source.check_streams(self.num_streams)

    def identity(self) -> dict[str, Any]:
        return {
            "debug.seed": self.settings.seed,
            "training.dataset_lanes": self.num_streams,
            **self.tokenizer.identity(),
            **self.source.identity(),
        }

    def check_position(self, index: int, position: dict) -> None:
        check_start(index, position)

    def open_stream(self, index: int, skips: Skips, position: dict | None) -> Stream:
        shard = Shard(index, self.num_streams)
        begin = START if position is None else position
        return PackedStream(self.source, self.tokenizer, shard, skips, self.settings, begin)
