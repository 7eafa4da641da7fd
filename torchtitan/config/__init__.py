"""The settings of a run: their keys, how they are read, and the rules that they must follow.

Nothing here imports torch.
"""

from torchtitan.config.data_tables import Chat
from torchtitan.config.degrees import Degrees, resolve_degrees
from torchtitan.config.job_config import (
    CHECKPOINT_PARTS,
    ActivationCheckpoint,
    Checkpoint,
    Comm,
    Compile,
    Debug,
    Job,
    JobConfig,
    LRScheduler,
    Model,
    Optimizer,
    Parallelism,
    Quantize,
    Training,
    Validation,
    to_dict,
)
from torchtitan.config.lora_tables import LoRA, LoRAOverride
from torchtitan.config.manager import ConfigManager
from torchtitan.config.metrics_tables import Metrics, Profiling
from torchtitan.config.optimizer_tables import EMA, ParamGroup
from torchtitan.config.phases import resolve_global_batch_size, run_schedule
from torchtitan.config.rules import validate
from torchtitan.config.schedule_tables import Alarm, Phase, Schedule

__all__ = [
    "CHECKPOINT_PARTS",
    "EMA",
    "ActivationCheckpoint",
    "Alarm",
    "Chat",
    "Checkpoint",
    "Comm",
    "Compile",
    "ConfigManager",
    "Debug",
    "Degrees",
    "Job",
    "JobConfig",
    "LRScheduler",
    "LoRA",
    "LoRAOverride",
    "Metrics",
    "Model",
    "Optimizer",
    "ParamGroup",
    "Parallelism",
    "Phase",
    "Profiling",
    "Quantize",
    "Schedule",
    "Training",
    "Validation",
    "resolve_degrees",
    "resolve_global_batch_size",
    "run_schedule",
    "to_dict",
    "validate",
]
