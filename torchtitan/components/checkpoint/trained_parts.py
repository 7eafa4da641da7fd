"""Checks that a checkpoint was trained as this run trains: its adapters and frozen parameters."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan.components.checkpoint.meta import Identity
from torchtitan.config.schema import as_text
from torchtitan.distributed.utils import ObjectCollectives
from torchtitan.ops.lora import is_adapter
from torchtitan.tools.errors import UserError, some

_SHAPES_IT = ("rank", "alpha", "fqns", "override")  # keys of [lora] that describe the adapters


def refuse_other_adapters(
    path: Path, meta: dict[str, Any], identity: Identity, parts: set[str]
) -> None:
    """Raise `UserError` for a checkpoint with other adapters than the run's.

    Weights without adapters are a start for a run with adapters, which begin at zero.

    parts: to load.
    """
    theirs, ours = meta["model"].get("lora"), identity.lora
    if theirs == ours or "model" not in parts:
        return
    if theirs is None:
        if "optimizer" in parts:
            raise UserError(
                f"checkpoint {path} has no adapters, but this run adds them (model.converters = "
                '["lora"]) and would resume it; start from its weights instead, with '
                "checkpoint.initial_load_path and another checkpoint.folder."
            )
        return
    if ours is None:
        raise UserError(
            f"checkpoint {path} has adapters (lora.rank = {theirs['rank']}), but this run has "
            'none; set model.converters to ["lora"] and [lora] as in its run, or merge them with '
            "convert_to_hf.py --merged and start from that folder."
        )
    differing = [
        f"lora.{key} ({as_text(theirs[key])} there, {as_text(ours[key])} here)"
        for key in _SHAPES_IT
        if theirs[key] != ours[key]
    ]
    if differing:
        raise UserError(
            f"checkpoint {path} has other adapters than this run: {some(differing, ', ')}; set "
            "[lora] as in its run, or start from weights without adapters."
        )


def stored_tensors(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors that a checkpoint with this meta.json has: adapters may be new."""
    if meta["model"].get("lora") is not None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}


def refuse_other_frozen(
    path: Path, index: Metadata, tensors: dict[str, Tensor], ranks: ObjectCollectives
) -> None:
    """Raise `UserError` where the optimizer's state in a checkpoint is of other parameters.

    tensors: to load, of this rank.
    """
    here = {name for names in ranks.gather(_trained(tensors)) for name in names}
    there = _trained(index.state_dict_metadata)
    if not here or here == there:
        return
    problems = [f"{name} was trained there and is frozen here" for name in sorted(there - here)]
    problems += [f"{name} is trained here and was frozen there" for name in sorted(here - there)]
    raise UserError(
        f"checkpoint {path} is of a run that trained other parameters: {some(problems, ', ', 3)}; "
        "set training.trainable_fqns and training.frozen_fqns as in that run, or leave its state "
        'out with checkpoint.exclude_from_loading = ["optimizer"].'
    )


def _trained(names: Any) -> set[str]:
    """Names of the parameters of which an optimizer keeps a state."""
    start = "optimizer."
    return {name.removeprefix(start).rpartition(".")[0] for name in names if name.startswith(start)}
