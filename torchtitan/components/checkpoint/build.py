"""Build a run's checkpoint manager from its config."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.components.checkpoint.adapters import adapter_files
from torchtitan.components.checkpoint.hf_rules import initial_hf_folder
from torchtitan.components.checkpoint.manager import CheckpointManager
from torchtitan.components.checkpoint.meta import make_identity
from torchtitan.config import JobConfig
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec


def build_checkpoint_manager(
    config: JobConfig, spec: TrainSpec, model_args: BaseModelArgs, layout: dict[str, Any]
) -> CheckpointManager:
    """Build the manager of a run. Every rank must call it: it may make a process group.

    layout: degrees of parallelism, by name.
    """
    identity = make_identity(config, model_args, layout)
    settings = config.checkpoint
    adapter = spec.state_dict_adapter and spec.state_dict_adapter(
        model_args, config.model.hf_assets_path
    )
    if settings.initial_load_in_hf:
        settings = replace(settings, initial_load_path=initial_hf_folder(config))
    return CheckpointManager(
        settings,
        folder=Path(config.job.dump_folder, settings.folder),
        total_steps=config.training.steps,
        identity=identity,
        adapter=adapter,
        lora=adapter_files(config, spec, model_args),
    )
