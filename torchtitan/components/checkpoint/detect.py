"""Detection of the model in a checkpoint or a Hugging Face folder, from its own description."""

from pathlib import Path
from typing import NamedTuple

from torchtitan.components.checkpoint.folder import (
    META,
    is_complete,
    read_json,
    require_checkpoint,
    steps_with_folder,
)
from torchtitan.components.checkpoint.meta import Identity
from torchtitan.components.checkpoint.resume import Start, refuse_other_model
from torchtitan.components.finetuning.lora import lora_of
from torchtitan.components.huggingface.folder import CONFIG, HFFolder
from torchtitan.config import LoRA
from torchtitan.protocols.model import BaseModelArgs, override_fields
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec, family_of, get_train_spec
from torchtitan.tools.errors import UserError


class DetectedModel(NamedTuple):
    """Model of a checkpoint or a Hugging Face folder.

    name: of the family.
    flavor: of a Hugging Face folder, the folder's name.
    lora: the table [lora] of a checkpoint with adapters; None = it has none.
    """

    name: str
    flavor: str
    spec: TrainSpec
    args: BaseModelArgs
    lora: LoRA | None = None


def detect_model(source: Path) -> DetectedModel:
    """Detect the model in `source`. Raises `UserError` where it is neither a checkpoint nor a
    Hugging Face folder, or where no family supports its model."""
    if is_complete(source):
        return _of_checkpoint(source)
    for folder in (source, source / "checkpoint"):  # of checkpoints, of a run
        if any(steps_with_folder(folder).values()):
            require_checkpoint(folder)  # names one of the steps
    config = HFFolder(source).config
    if not config:
        raise UserError(f"{source} has no {CONFIG}, which describes the model; add it.")
    family = family_of(config)
    spec = get_train_spec(family)
    args = spec.hf_adapter.args_of(config)
    return DetectedModel(family, source.absolute().name, spec, args)


def _of_checkpoint(source: Path) -> DetectedModel:
    model = read_json(source, META).get("model")
    if not isinstance(model, dict):
        model = {}
    fields = {"name": str, "flavor": str, "all_args": dict}
    for key, kind in fields.items():
        if not isinstance(model.get(key), kind):
            raise UserError(
                f"checkpoint {source} can't be used: its {META} lacks model.{key}; take another "
                "checkpoint."
            )
    try:
        spec = get_train_spec(model["name"])
        template = next(iter(spec.model_args.values()))
        args = override_fields(template, model["all_args"], "model.args")
    except UserError as error:
        raise UserError(
            f"{source / META} describes a model that this version does not support: {error}"
        ) from None
    lora = None if model.get("lora") is None else lora_of(model["lora"])
    return DetectedModel(model["name"], model["flavor"], spec, args, lora)


def args_at_start(
    start: Start, identity: Identity, model_args: BaseModelArgs, adapter: StateDictAdapter | None
) -> BaseModelArgs | None:
    """Arguments of the model whose weights a run begins from.

    None where the run begins without weights, or where the arguments are not stored with them.
    Raises `UserError` for a checkpoint of another model than the run's.

    identity, model_args, adapter: of the run.
    """
    if start.path is None or "model" not in start.parts:
        return None
    if start.in_hf:
        config = HFFolder(start.path).config
        return adapter.args_of(config) if adapter and config else None
    meta = read_json(start.path, META)
    refuse_other_model(start.path, meta, identity)
    return override_fields(model_args, meta["model"]["all_args"], "model.args")
