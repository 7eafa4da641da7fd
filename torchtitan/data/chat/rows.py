"""Rows of files that hold conversations, or pairs of prompt and completion."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torchtitan.data.chat.conversation import read_conversation, read_pair
from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.documents import Record, keys_there

# Keys of which a row must have one, by format.
CONVERSATION_KEYS = {"chat": ("messages", "conversations"), "prompt_completion": ("prompt",)}


@dataclass(frozen=True)
class ConversationRows:
    """Rows that are kept whole, for the chat template."""

    format: Literal["chat", "prompt_completion"]

    @property
    def columns(self) -> None:
        return None

    @property
    def key(self) -> str:
        return "' or '".join(CONVERSATION_KEYS[self.format])

    def record(self, where: str, fields: Mapping) -> Record:
        if not any(fields.get(key) is not None for key in CONVERSATION_KEYS[self.format]):
            return Record(where, problem=f"no '{self.key}' key", found=keys_there(fields))
        try:
            if self.format == "chat":
                read_conversation(fields).check_answered()
            else:
                read_pair(fields)
        except ChatProblem as error:
            return Record(where, problem=error.problem, found=error.found)
        return Record(where, row=fields)
