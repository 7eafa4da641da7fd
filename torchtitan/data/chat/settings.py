"""Settings of how conversations become training examples: the table [chat]."""

from torchtitan.config import Chat as ChatSettings

__all__ = ["ChatSettings"]
