"""Between our state dict and Hugging Face's: a table of tensors, and what is said about them."""

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
    """One tensor of Hugging Face's files, and where it stands in our state dict.

    name: theirs. ours: name in our state dict. index: which part of our dim 0 it is (an expert of a
    stack); None = all of ours. shape: of the piece. fp32: never written in less. fp8: has the
    block-wise form in FP8 files. from_zero: written minus its minimum (`written`). copy: another
    name for what the piece of `ours` that is no copy holds; written, but not needed for reading.
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
        """What files hold of a tensor (a whole one where `from_zero`).

        A selection bias becomes fp32 minus its minimum, which changes no choice of experts. No
        entry is negative then, which readers need that mask left-out groups with 0, and an offset
        such as DeepSeek-V3's 7 takes no digits where a reader rounds.
        """
        if not self.from_zero:
            return tensor
        return (tensor.double() - tensor.min().double()).float()


def warn_of_copies(source: object, names: Iterable[str]) -> None:
    """Say which copies in the layers of multi-token prediction differ from what they copy."""
    if names := sorted(names):
        logger.warning(
            "%s: %s differ%s from the model's own embedding or head, which its layers of "
            "multi-token prediction use here; their first losses will be higher than they were",
            source,
            some(names),
            "s" if len(names) == 1 else "",
        )


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
    def sizes(self, model_args: Any) -> dict[str, Any]:
        """The arguments (by name, such as moe_args.num_experts) that decide names and shapes."""

    def explain(self, names: Set[str]) -> str | None:
        """Why these names of a folder are not the model's, and the way out; None = not known."""
        return None

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
        """Ours to Hugging Face's: names and layouts only; files hold `Piece.written` of it."""
