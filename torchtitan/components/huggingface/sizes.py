"""The flavor "from_hf": sizes of the model that a Hugging Face folder's config.json describes."""

from dataclasses import asdict, replace
from typing import Any

from torchtitan.components.huggingface.assets import find_assets
from torchtitan.components.huggingface.folder import CONFIG
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, family_of, get_flavor
from torchtitan.tools.errors import UserError
from torchtitan.tools.near_path import near_path

FROM_HF = "from_hf"


def flavor_of(config: JobConfig, spec: TrainSpec) -> BaseModelArgs:
    """Return the arguments of the run's flavor, read from `model.hf_assets_path` where it is
    "from_hf". Raises `UserError`."""
    model = config.model
    if model.flavor != FROM_HF:
        return get_flavor(spec, model.name, model.flavor)
    assets = find_assets(model.hf_assets_path)
    if assets is None or not assets.config:
        way_out = "name the folder of the model (scripts/download_hf_assets.py fetches it)."
        raise UserError(
            f'model.flavor = "{FROM_HF}" takes the sizes from {CONFIG} in model.hf_assets_path, '
            f"but {model.hf_assets_path} has none; {near_path(model.hf_assets_path, way_out)}"
        )
    try:
        family = family_of(assets.config)
        if family != model.name:
            raise UserError(
                f"it describes a model of another family, {assets.config['model_type']!r}: set "
                f"model.name to '{family}'."
            )
        return spec.hf_adapter.args_of(assets.config).as_flavor()
    except UserError as error:
        raise UserError(f'model.flavor = "{FROM_HF}", {assets.folder / CONFIG}: {error}') from None


def without_folder(config: JobConfig, spec: TrainSpec, args: BaseModelArgs) -> JobConfig:
    """Return the config with all arguments in [model.args], so that it needs no folder.

    args: of the run.
    """
    if config.model.flavor != FROM_HF:
        return config
    spelled = _without_null(asdict(args))
    spelled.pop("max_seq_len")
    return replace(
        config, model=replace(config.model, flavor=next(iter(spec.model_args)), args=spelled)
    )


def _without_null(table: dict[str, Any]) -> dict[str, Any]:
    """Replace None by "none", which TOML can hold."""
    return {
        name: _without_null(value)
        if isinstance(value, dict)
        else "none"
        if value is None
        else value
        for name, value in table.items()
    }
