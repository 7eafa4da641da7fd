"""Checks of a run's Hugging Face folders, before the run starts."""

from pathlib import Path

from torchtitan.components.checkpoint.adapters import adapter_files, check_adapter_folder
from torchtitan.components.checkpoint.folder import steps_with_folder
from torchtitan.components.finetuning.peft import check_peft
from torchtitan.components.huggingface.assets import find_assets
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.components.huggingface.load_save import check_folder
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.errors import UserError
from torchtitan.tools.near_path import require_path


def check_hf(config: JobConfig, spec: TrainSpec, model_args: BaseModelArgs) -> None:
    """Raise `UserError` for problems with the folders that a run reads and writes, as far as they
    can be known before the run."""
    settings = config.checkpoint
    _check_adapters(config, spec, model_args)
    keys = [key for key in ("initial_load_in_hf", "last_save_in_hf") if getattr(settings, key)]
    if not (settings.enable and keys):
        return
    if spec.state_dict_adapter is None:
        raise UserError(
            f"checkpoint.{keys[0]} = true, but model.name '{config.model.name}' has no Hugging "
            "Face format; set it to false."
        )
    adapter = spec.state_dict_adapter(model_args, config.model.hf_assets_path)
    if settings.last_save_in_hf:
        adapter.check_export()
        find_assets(config.model.hf_assets_path)
    own = Path(config.job.dump_folder, settings.folder)
    if settings.initial_load_in_hf and not steps_with_folder(own):
        path, given = initial_hf_folder(config), settings.initial_load_path
        require_path("checkpoint.initial_load_path" if given else "model.hf_assets_path", path)
        folder = HFFolder(path, spec.hf_repos.get(config.model.flavor))
        check_folder(folder, adapter, quantized=settings.initial_load_in_hf_quantized)


def _check_adapters(config: JobConfig, spec: TrainSpec, model_args: BaseModelArgs) -> None:
    lora, files = config.lora, adapter_files(config, spec, model_args)
    if files is None:
        return
    settings = config.checkpoint
    if settings.enable and settings.last_save_in_hf and not lora.save_merged:
        check_peft(files.sizes)
    if lora.initial_load_path is not None:
        require_path("lora.initial_load_path", lora.initial_load_path)
        adapter = spec.hf_adapter(model_args, config.model.hf_assets_path)
        check_adapter_folder(Path(lora.initial_load_path), adapter, files.sizes)


def initial_hf_folder(config: JobConfig) -> str:
    """Return `checkpoint.initial_load_path`, or by default the tokenizer's folder."""
    return config.checkpoint.initial_load_path or config.model.hf_assets_path
