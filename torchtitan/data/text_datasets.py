"""Text as training examples: the documents of one source, packed into streams."""

from typing import Any

from torchtitan.data.documents import Skips
from torchtitan.data.packing import START, PackedStream, check_start
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.sources import Shard, Source
from torchtitan.data.stream_dataset import StreamDataset
from torchtitan.data.tokenizer import Tokenizer


class TextDataset(StreamDataset):
    """Examples of one source of documents.

    source: documents
    tokenizer: text to token ids
    seq_len: tokens per example
    rank_slice: which examples; by default all
    num_streams: number of streams; None lets the source decide
    seed: seed of the order of documents
    infinite: whether the data begins anew when it ends; see `StreamDataset`
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        rank_slice: RankSlice = RankSlice(),  # noqa: B008 - it is frozen
        num_streams: int | None = None,
        seed: int = 0,
        infinite: bool = True,
    ) -> None:
        super().__init__(source.num_streams() if num_streams is None else num_streams, rank_slice)
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.infinite = infinite
        ids = (tokenizer.pad_id, tokenizer.eos_id)
        self.pad_id = next((i for i in ids if i is not None), 0)
        source.check_streams(self.num_streams)

    def identity(self) -> dict[str, Any]:
        return {
            "debug.seed": self.seed,
            "training.dataset_lanes": self.num_streams,
            **self.tokenizer.identity(),
            **self.source.identity(),
        }

    def check_position(self, index: int, position: dict) -> None:
        check_start(index, position)

    def open_stream(self, index: int, skips: Skips, position: dict | None) -> PackedStream:
        return PackedStream(
            self.source,
            self.tokenizer,
            Shard(index, self.num_streams),
            skips,
            seq_len=self.seq_len,
            seed=self.seed,
            infinite=self.infinite,
            position=START if position is None else position,
        )
