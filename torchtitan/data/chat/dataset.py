"""Conversations as training examples: the rows of one source, rendered and packed into streams."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

from torchtitan.data.chat.packing import START, ConversationStream, Example, check_start
from torchtitan.data.documents import Skips
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Shard, Source
from torchtitan.data.text_datasets import TextDataset
from torchtitan.data.tokenizer import Tokenizer


class Renderer(Protocol):
    """Turns rows into examples, see `ChatRenderer`."""

    @property
    def identity(self) -> str: ...

    def examples(self, row: Mapping, kind: str) -> list[Example]: ...


class ChatDataset(TextDataset):
    """Examples of one source of conversations; arguments as of `TextDataset`.

    renderer: conversations to tokens
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        settings: DataSettings,
        rank_slice: RankSlice,
        renderer: Renderer,
    ) -> None:
        super().__init__(source, tokenizer, settings, rank_slice)
        self.renderer = renderer

    def identity(self) -> dict[str, Any]:
        chat = {f"chat.{name}": value for name, value in asdict(self.settings.chat).items()}
        return super().identity() | chat | {"chat template": self.renderer.identity}

    def check_position(self, index: int, position: dict) -> None:
        check_start(index, position)

    def open_stream(self, index: int, skips: Skips, position: dict | None) -> ConversationStream:
        return ConversationStream(
            self.source,
            partial(self.renderer.examples, kind=self.source.settings.format),
            Shard(index, self.num_streams),
            skips,
            self.settings,
            START if position is None else position,
        )
