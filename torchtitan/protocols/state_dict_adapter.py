"""Between our state dict and Hugging Face's: a table of tensors, and what is said about them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from torchtitan.protocols.model import BaseModelArgs


@dataclass(frozen=True)
class Piece:
    """One tensor of Hugging Face's files, and where it stands in our state dict.

    name: theirs. ours: name in our state dict. index: which part of our dim 0 it is (an expert of a
    stack); None = all of ours. shape: of the piece. fp32: never written in less. fp8: has the
    block-wise form in FP8 files. centred: written minus its mean, which changes nothing for the
    model and keeps its digits where low precision resolves them.
    """

    name: str
    ours: str
    index: int | None
    shape: tuple[int, ...]
    fp32: bool = False
    fp8: bool = False
    centred: bool = False


class StateDictAdapter(ABC):
    """hf_assets_path: folder with the Hugging Face `config.json`, if there is one. model_types:
    those that it may name.
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model_args: BaseModelArgs, hf_assets_path: str | None = None):
        self.model_args = model_args
        self.hf_assets_path = hf_assets_path

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """All tensors of the whole model, in the order of Hugging Face's files."""

    @abstractmethod
    def left_out(self, name: str) -> str | None:
        """Why a tensor of theirs is not needed here, in a few words; None = it is not known."""

    @abstractmethod
    def row_order(self, piece: Piece, hf_config: Mapping[str, Any]) -> Tensor | None:
        """For each of our rows the row in their file, int64; None = the same order."""

    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The `config.json` of the model."""

    @abstractmethod
    def check_export(self) -> None:
        """Raise `UserError` where Hugging Face has no class that computes what this model does."""

    @classmethod
    @abstractmethod
    def args_of(cls, hf_config: Mapping[str, Any]) -> BaseModelArgs:
        """Arguments of the model that a `config.json` describes. Raises `UserError` for others."""

    def notes(self) -> list[str]:
        """A sentence on each number of the model that readers of its `config.json` don't agree
        about."""
        return []

    @classmethod
    def notes_on(cls, hf_config: Mapping[str, Any]) -> list[str]:
        """A sentence on each thing in a `config.json` that is read otherwise elsewhere, or not at
        all here. Raises `UserError` as `args_of` does."""
        return []

    def routing_changes(
        self, state: Mapping[str, Tensor], written: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """By layer, the share of tokens that meet other experts with the `written` router than with
        that of `state`. Both: whole tensors of `router_names()`, of some layers or of all.
        """
        return {}

    def router_names(self) -> list[str]:
        """Names in our state dict of what routing depends on."""
        return []

    @abstractmethod
    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hugging Face's names and layouts to ours. Raises `UserError` naming what is too much."""

    @abstractmethod
    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ours to Hugging Face's."""
