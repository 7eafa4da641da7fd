"""The rules of a config, in the order in which they are checked, before the run starts.

A rule for one table is in the file of that name, or in `values.py` where it is a range or a choice;
a rule for several tables, or for a table and the device, in `together.py`; for files, folders and
the machine, in `trainer/preflight.py`; for the model, in its arguments (`models/<name>/args.py`).
Each raises `UserError` with one sentence: the key, its value, the rule, the way out.
"""

from torchtitan.config.blend import blend_segments
from torchtitan.config.degrees import check_sequence, resolve_degrees
from torchtitan.config.job_config import JobConfig
from torchtitan.config.phases import run_schedule
from torchtitan.config.rules.checkpoint import check_checkpoint
from torchtitan.config.rules.lora import check_finetuning
from torchtitan.config.rules.metrics import check_alarms
from torchtitan.config.rules.numbers import check_numbers
from torchtitan.config.rules.optimizer import check_optimizer_groups, check_state_dtype
from torchtitan.config.rules.quantize import check_converters
from torchtitan.config.rules.schedule import check_schedule
from torchtitan.config.rules.text import check_text
from torchtitan.config.rules.together import (
    check_async_tensor_parallel,
    check_cpu_offload,
    check_cuda_graph,
    check_early_step,
    check_memory_budget,
)
from torchtitan.config.rules.values import (
    check_choices,
    check_profiling,
    check_ranges,
    check_renamed,
    check_supported,
    check_validation,
)


def validate(config: JobConfig, world_size: int, device_type: str = "cpu") -> None:
    """Raise UserError for the first setting that a run of `world_size` processes cannot have."""
    assert world_size >= 1, f"world_size is {world_size}"
    check_supported(config)
    check_converters(config, device_type)
    check_renamed(config)
    check_ranges(config)
    check_text(config)
    check_numbers(config)
    check_choices(config)
    check_memory_budget(config)
    check_cpu_offload(config, world_size, device_type)
    check_state_dtype(config)
    check_optimizer_groups(config)
    check_finetuning(config)
    check_profiling(config, device_type)
    check_validation(config)
    check_checkpoint(config, world_size)
    check_alarms(config)
    degrees = resolve_degrees(config.parallelism, world_size)
    check_sequence("training.seq_len", config.training.seq_len, degrees)
    if config.validation.enable:
        check_sequence("validation.seq_len", config.validation.seq_len, degrees)
    check_async_tensor_parallel(config, device_type)
    schedule = run_schedule(config, degrees.dp_replicate * degrees.dp_shard)
    check_schedule(schedule, config, degrees)
    blend_segments(config, schedule)
    check_early_step(config, world_size)
    check_cuda_graph(config, device_type)
