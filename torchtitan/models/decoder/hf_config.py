"""What families' reading and writing of `config.json` has in common."""

from collections.abc import Mapping
from typing import Any, NoReturn

from torchtitan.tools.errors import UserError


def expect(key: str, value: Any, *allowed: Any) -> None:
    """Raise `UserError` where `config.json` says what the family is not built for. None among
    `allowed`: the key may be missing."""
    if value not in allowed:
        known = " or ".join(repr(each) for each in allowed if each is not None)
        raise UserError(
            f"config.json has {key} = {value!r}, but this architecture is only built with {known}; "
            "such weights would mean something else here."
        )


def refuse_export(argument: str, value: Any, family: str, needed: str) -> NoReturn:
    """For a model that Hugging Face has no class for. argument: of moe_args."""
    raise UserError(
        f"no Hugging Face model computes this one: with model.args.moe_args.{argument} = "
        f"{value!r} it is not a {family}, which has {needed} there; train with that, or keep the "
        "checkpoint in our own format (checkpoint.last_save_in_hf = false)."
    )


def rope_settings(
    config: Mapping[str, Any], default_theta: float
) -> tuple[str, float, Mapping[str, Any]]:
    """Kind of scaling ("default": none), base, and the scaling's numbers.

    transformers 5 writes `rope_parameters`, all others `rope_scaling` beside `rope_theta`.
    """
    parameters = config.get("rope_parameters") or {}
    scaling = parameters or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = parameters.get("rope_theta", config.get("rope_theta", default_theta))
    return kind, float(theta), scaling
