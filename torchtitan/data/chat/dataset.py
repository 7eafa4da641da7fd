"""Conversations as training examples: the rows of one source, rendered and packed into streams."""

from dataclasses import asdict
from functools import partial
from typing import Any

from torchtitan.data.chat.packing import START, ConversationStream, check_start
from torchtitan.data.chat.renderer import ChatRenderer
from torchtitan.data.documents import Skips
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.settings import DataSettings
from torchtitan.data.sources import Shard, Source
from torchtitan.data.text_datasets import TextDataset
from torchtitan.data.tokenizer import Tokenizer


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
        renderer: ChatRenderer,
    ) -> None:
        super().__init__(source, tokenizer, settings, rank_slice)
        self.renderer = renderer

    def identity(self) -> dict[str, Any]:
        chat = {f"chat.{name}": value for name, value in asdict(self.settings.chat).items()}
        if self.source.settings.format == "chat":
            chat["chat template"] = self.renderer.identity
        return super().identity() | chat

    def check_position(self, index: int, position: dict) -> None:
        check_start(index, position)

    def open_stream(self, index: int, skips: Skips, position: dict | None) -> ConversationStream:
        kind = self.source.settings.format
        assert kind != "text", kind
        return ConversationStream(
            self.source,
            partial(self.renderer.examples, kind=kind),
            Shard(index, self.num_streams),
            skips,
            self.settings,
            START if position is None else position,
        )
