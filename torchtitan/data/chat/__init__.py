"""Conversations for fine-tuning: rendered by the model's template, with what is trained marked."""

from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.chat.renderer import ChatExample, ChatRenderer
from torchtitan.data.chat.settings import ChatSettings

__all__ = ["ChatExample", "ChatProblem", "ChatRenderer", "ChatSettings"]
