"""The description of a model family for the trainer, and the lookup of families by name."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torchtitan
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.tools.errors import UserError, suggest


@dataclass(frozen=True)
class TrainSpec:
    """Description of a model family.

    model_cls: called with one of `model_args`.
    model_args: by flavor.
    parallelize_fn: changes a model in place, see `parallelize_decoder`.
    state_dict_adapter: None = no Hugging Face format.
    hf_repos: repository on the Hugging Face hub with tokenizer and weights, by flavor.
    """

    model_cls: type[BaseModel]
    model_args: Mapping[str, BaseModelArgs]
    parallelize_fn: Callable[..., BaseModel]
    state_dict_adapter: type[StateDictAdapter] | None = None
    hf_repos: Mapping[str, str] = field(default_factory=dict)

    @property
    def hf_adapter(self) -> type[StateDictAdapter]:
        """Return `state_dict_adapter`. Raises `UserError` where the family has none."""
        if self.state_dict_adapter is None:
            raise UserError(
                f"{self.model_cls.__name__} has no state dict adapter, which Hugging Face's format "
                "needs; take a model of another family."
            )
        return self.state_dict_adapter


def get_train_spec(name: str) -> TrainSpec:
    """Return the spec of `torchtitan.models.<name>`. Raises `UserError` for an unknown name."""
    # The only upward import that is allowed (design.md): a family registers by its folder.
    known = _family_names()
    if name not in known:
        raise UserError(f"model.name '{name}' is not a model family{suggest(name, known)}")
    return importlib.import_module(f"torchtitan.models.{name}").get_train_spec()


def family_of(hf_config: Mapping[str, Any]) -> str:
    """Find the family that reads such a `config.json`. Raises `UserError` where none does."""
    adapters = {name: get_train_spec(name).state_dict_adapter for name in _family_names()}
    reads = {name: adapter.model_types for name, adapter in adapters.items() if adapter}
    model_type = hf_config.get("model_type")
    for name, model_types in reads.items():
        if model_type in model_types:
            return name
    known = ", ".join(repr(each) for model_types in reads.values() for each in model_types)
    raise UserError(
        f"config.json has model_type {model_type!r}, which no family here supports (supported: "
        f"{known}); name the folder of such a model."
    )


def get_flavor(spec: TrainSpec, name: str, flavor: str) -> BaseModelArgs:
    """Return the arguments of one flavor. Raises `UserError` for an unknown one."""
    if flavor not in spec.model_args:
        raise UserError(
            f"model.flavor '{flavor}' is not a flavor of model.name '{name}'"
            f"{suggest(flavor, spec.model_args)}"
        )
    return spec.model_args[flavor]


def _family_names() -> list[str]:
    models = f"{torchtitan.__path__[0]}/models"
    shared = ("decoder", "moe")
    return [m.name for m in pkgutil.iter_modules([models]) if m.ispkg and m.name not in shared]
