"""Conversations for fine-tuning: rendered by the model's template, with what is trained marked."""

from torchtitan.data.chat.problems import ChatProblem
from torchtitan.data.chat.renderer import ChatExample, ChatRenderer

__all__ = ["ChatExample", "ChatProblem", "ChatRenderer"]
