"""Between our state dict and Hugging Face's."""

from abc import ABC, abstractmethod

from torch import Tensor

from torchtitan.protocols.model import BaseModelArgs


class StateDictAdapter(ABC):
    """hf_assets_path: folder with the Hugging Face `config.json`, if there is one."""

    def __init__(self, model_args: BaseModelArgs, hf_assets_path: str | None = None):
        self.model_args = model_args
        self.hf_assets_path = hf_assets_path

    @abstractmethod
    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hugging Face's names and layouts to ours. Raises `UserError` naming what is too much."""

    @abstractmethod
    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ours to Hugging Face's."""
