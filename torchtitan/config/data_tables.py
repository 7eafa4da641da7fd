"""Tables about data: [[training.blend]], [[validation.sets]] and [chat]."""

from dataclasses import dataclass, field
from typing import Any, Literal

Format = Literal["text", "chat", "prompt_completion"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset of a blend. The keys are those of [training]."""

    name: str
    """Name of the dataset in phases and in the log."""
    weight: float | None = None
    """Share of the sequences, over the sum of weights; unset: not read until a phase names it."""
    dataset: str = "text"
    """Name of the dataset."""
    dataset_path: str | None = None
    """File, folder or glob to read the dataset from, for local data."""
    dataset_text_key: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    format: Format = "text"
    """Rows are texts, conversations (chat), or pairs of prompt and completion."""


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """A data set of the validation. The keys are those of [validation]."""

    name: str
    """Name of the data set in the log and in the metrics."""
    dataset: str = "text"
    """Name of the dataset."""
    dataset_path: str | None = None
    """File, folder or glob to read the dataset from, for local data."""
    dataset_text_key: str = "text"
    """Field of jsonl and parquet records that holds the text."""
    format: Format = "text"
    """Rows are texts, conversations (chat), or pairs of prompt and completion."""


@dataclass(frozen=True)
class Chat:
    """Conversations: which tokens are trained, and how they fill sequences (ours)."""

    template: str | None = None
    """Chat template: a Jinja file, deepseek_v32 or deepseek_v4; unset: the tokenizer's (ours)."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the template, such as enable_thinking (ours)."""
    turns: Literal["all", "last"] = "all"
    """Turns of the assistant that are trained (ours)."""
    train_reasoning: bool = True
    """Train the assistant's reasoning too (ours)."""
    train_tool_calls: bool = True
    """Train the assistant's calls of tools too (ours)."""
    too_long: Literal["drop", "cut", "refuse"] = "drop"
    """With more tokens than a sequence: leave out, cut behind an answer, or end the run (ours)."""
    loss_weight: Literal["token", "conversation"] = "token"
    """Weight each trained token alike, or each conversation (ours)."""
    look_ahead: int = 128
    """Conversations that are read ahead to fill sequences, by stream of documents (ours)."""
