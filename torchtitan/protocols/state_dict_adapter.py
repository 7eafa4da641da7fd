"""Conversion between our state dict and Hugging Face's: a table of tensors, and notes on them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.errors import some
from torchtitan.tools.logging import logger


@dataclass(frozen=True)
class Piece:
    """One tensor of Hugging Face's files, and its place in our state dict.

    name: in their files.
    ours: name in our state dict.
    index: along our dim 0 (an expert of a stack); None = the whole tensor of ours.
    shape: of the piece.
    fp32: always written in fp32.
    fp8: block-wise FP8 in FP8 files.
    from_zero: written minus its minimum (`written`).
    copy: a second copy of `ours` under another name; written, but not needed for reading.
    """

    name: str
    ours: str
    index: int | None
    shape: tuple[int, ...]
    fp32: bool = False
    fp8: bool = False
    from_zero: bool = False
    copy: bool = False

    def written(self, tensor: Tensor) -> Tensor:
        """Convert a tensor (a whole one where `from_zero`) to the form of the files.

        A selection bias becomes fp32 minus its minimum, which changes no choice of experts. No
        entry is negative then, as readers need that mask left-out groups with 0, and an offset such
        as DeepSeek-V3's 7 costs no digits where a reader rounds.
        """
        if not self.from_zero:
            return tensor
        return (tensor.double() - tensor.min().double()).float()


def warn_of_copies(source: object, names: Iterable[str]) -> None:
    """Warn of copies in the layers of multi-token prediction that differ from their originals."""
    if names := sorted(names):
        logger.warning(
            "%s: %s differ%s from the model's own embedding or head, which the layers of "
            "multi-token prediction use here; their first losses will be higher than in training",
            source,
            some(names),
            "s" if len(names) == 1 else "",
        )


class StateDictAdapter(ABC):
    """Converts state dicts of a family to and from Hugging Face's format.

    model_types: values of `model_type` in config.json that the family reads.
    hf_assets_path: folder with the Hugging Face `config.json`, or None.
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model_args: BaseModelArgs, hf_assets_path: str | None = None):
        self.model_args = model_args
        self.hf_assets_path = hf_assets_path

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """List all tensors of the whole model, in the order of Hugging Face's files."""

    @abstractmethod
    def left_out(self, name: str) -> str | None:
        """Give the reason why a tensor of theirs is not needed here; None = it is unknown."""

    @abstractmethod
    def sizes(self, model_args: Any) -> dict[str, Any]:
        """Arguments, by name such as moe_args.num_experts, that decide names and shapes."""

    def explain(self, names: Set[str]) -> str | None:
        """Explain why these names of a folder are not the model's, with the way out; None = the
        reason is unknown."""
        return None

    @abstractmethod
    def row_order(self, piece: Piece, hf_config: Mapping[str, Any]) -> Tensor | None:
        """Row in their file for each of our rows, int64; None = the same order."""

    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """Make the model's `config.json`."""

    @abstractmethod
    def check_export(self) -> None:
        """Raise `UserError` where no Hugging Face class computes the same as this model."""

    @classmethod
    @abstractmethod
    def args_of(cls, hf_config: Mapping[str, Any]) -> BaseModelArgs:
        """Read the arguments of the model that a `config.json` describes. Raises `UserError` for
        unsupported models."""

    def notes(self) -> list[str]:
        """Describe each number of the model that readers of its `config.json` interpret
        differently."""
        return []

    @classmethod
    def notes_on(cls, hf_config: Mapping[str, Any]) -> list[str]:
        """Describe each value of a `config.json` that other readers interpret differently, or that
        is ignored here. Raises `UserError` as `args_of` does."""
        return []

    def routing_changes(
        self, state: Mapping[str, Tensor], written: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Share of tokens whose experts differ between the routers of `state` and `written`, by
        layer.

        state, written: whole tensors of `router_names()`, of some layers or of all.
        """
        return {}

    def router_names(self) -> list[str]:
        """Names in our state dict of the tensors that routing depends on."""
        return []

    @abstractmethod
    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert Hugging Face's names and layouts to ours. Raises `UserError` for unknown ones."""

    @abstractmethod
    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert our names and layouts to Hugging Face's; files hold `Piece.written` of these."""
