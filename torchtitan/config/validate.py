"""What the values of a config may be, alone and together: pure checks before anything is started.

Each check raises UserError with one sentence: the key, its value, the rule, the way out.
The model's own arguments are checked by the model, data paths by the data layer.
"""

import math
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

from torchtitan.config.alarm_rules import check_alarms
from torchtitan.config.blend import blend_stretches
from torchtitan.config.checkpoint_rules import check_checkpoint
from torchtitan.config.degrees import check_sequence, nearest, resolve_degrees
from torchtitan.config.job_config import JobConfig
from torchtitan.config.number_rules import check_numbers
from torchtitan.config.optimizer_rules import check_optimizer_groups
from torchtitan.config.run_schedule import RunSchedule
from torchtitan.config.schedule_rules import check_schedule
from torchtitan.config.schema import as_text
from torchtitan.config.text_rules import check_text
from torchtitan.tools.errors import UserError, suggest

# Towards the new value a step moves a running mean by 1 - beta of the way; bf16 resolves 0.4 %.
LARGEST_BF16_BETA = 0.99


def validate(config: JobConfig, world_size: int, device_type: str = "cpu") -> None:
    """Raise UserError for the first setting that a run of `world_size` processes cannot have."""
    assert world_size >= 1, f"world_size is {world_size}"
    _check_supported(config)
    _check_renamed(config)
    _check_ranges(config)
    check_text(config)
    check_numbers(config)
    _check_choices(config)
    _check_memory_budget(config)
    _check_cpu_offload(config, world_size, device_type)
    _check_state_dtype(config)
    check_optimizer_groups(config)
    _check_profiling(config, device_type)
    _check_validation(config)
    check_checkpoint(config, world_size)
    check_alarms(config)
    degrees = resolve_degrees(config.parallelism, world_size)
    check_sequence("training.seq_len", config.training.seq_len, degrees)
    if config.validation.enable:
        check_sequence("validation.seq_len", config.validation.seq_len, degrees)
    _check_async_tensor_parallel(config, device_type)
    schedule = run_schedule(config, degrees.dp_replicate * degrees.dp_shard)
    check_schedule(schedule, config, degrees)
    blend_stretches(config, schedule)
    _check_early_step(config, world_size)
    _check_cuda_graph(config, world_size, device_type)


def _get(config: JobConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


# ---------------------------------------------------------------------------------------------
# Features that are not there yet
# ---------------------------------------------------------------------------------------------

# key, what it may hold, the feature. Keys that only shape one of these features (the pipeline
# schedule, checkpoint.interval, [quantize], ...) have no effect without it and may hold anything.
_NOT_YET: list[tuple[str, tuple[Any, ...], str]] = [
    ("model.converters", ([],), "converting the model (FP8)"),
    ("metrics.enable_wandb", (False,), "Weights & Biases"),
    ("comm.mode", ("default", "fake_backend"), "the local-tensor mode"),
]


def _check_supported(config: JobConfig) -> None:
    for key, allowed, feature in _NOT_YET:
        value = _get(config, key)
        if value not in allowed:
            choices = " or ".join(as_text(choice) for choice in allowed)
            raise UserError(
                f"{feature} is not supported yet, but {key} = {as_text(value)}; "
                f"set it to {choices}."
            )


def _check_renamed(config: JobConfig) -> None:
    if config.model.tokenizer_path is not None:
        raise UserError(
            f"model.tokenizer_path = {as_text(config.model.tokenizer_path)} has a new name; "
            "set model.hf_assets_path to the folder that holds the tokenizer."
        )
    if config.job.custom_config_module:
        raise UserError(
            f"job.custom_config_module = {as_text(config.job.custom_config_module)} is not "
            "supported; set model arguments in [model.args] and leave it empty."
        )


# ---------------------------------------------------------------------------------------------
# Values alone
# ---------------------------------------------------------------------------------------------

# The rule in words, the same as a test, and the keys that it holds for; a key may be unset (None).
# NaN fails every comparison, so no rule needs to name it.
_RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "1 or more",
        lambda value: value >= 1,
        "training.local_batch_size training.seq_len training.steps training.gc_freq "
        "training.dataset_lanes "
        "metrics.log_freq profiling.profile_freq profiling.profiler_active "
        "comm.init_timeout_seconds comm.train_timeout_seconds checkpoint.interval "
        "ema.interval",
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        "lr_scheduler.warmup_steps training.dataset_num_workers profiling.profiler_warmup "
        "comm.trace_buf_size checkpoint.keep_latest_k ema.start_step",
    ),
    (
        "a finite number, 0 or more",
        lambda value: 0 <= value < math.inf,
        "optimizer.lr optimizer.weight_decay",
    ),
    ("a finite number greater than 0", lambda value: 0 < value < math.inf, "optimizer.eps"),
    ("greater than 0 (inf switches clipping off)", lambda value: value > 0, "training.max_norm"),
    (
        "at least 0 and less than 1",
        lambda v: 0 <= v < 1,
        "optimizer.beta1 optimizer.beta2 optimizer.muon_momentum ema.decay",
    ),
    (
        "between 0 and 1",
        lambda value: 0 <= value <= 1,
        "lr_scheduler.decay_ratio lr_scheduler.min_lr_factor training.fim_rate",
    ),
    # The seed is sent to all ranks as a signed 64-bit integer.
    ("between 0 and 2**63 - 1", lambda value: 0 <= value < 2**63, "debug.seed"),
    ("0 or more, or -1 for the newest", lambda value: value >= -1, "checkpoint.load_step"),
    ("a finite number above 1", lambda v: 1 < v < math.inf, "training.loss_spike_factor"),
    (
        "a name, not empty",
        lambda value: value.strip() != "",
        "job.dump_folder job.save_config_file model.name model.flavor training.dataset "
        "training.dataset_text_key compile.backend checkpoint.folder",
    ),
]


def _check_ranges(config: JobConfig) -> None:
    for rule, holds, keys in _RANGES:
        for key in keys.split():
            value = _get(config, key)
            if value is not None and not holds(value):
                raise UserError(f"{key} = {as_text(value)} must be {rule}.")


def _check_choices(config: JobConfig) -> None:
    for component in config.compile.components:
        if component not in ("model", "loss"):
            raise UserError(
                f"compile.components names '{component}', which cannot be compiled"
                f"{suggest(component, ['model', 'loss'])}"
            )
    option = config.activation_checkpoint.selective_ac_option
    if option not in ("op", "elementwise") and not re.fullmatch("[1-9][0-9]{0,5}", option):
        raise UserError(
            f"activation_checkpoint.selective_ac_option = {as_text(option)} must be "
            '"op", "elementwise" or a positive integer as a string, such as "2".'
        )
    check = config.activation_checkpoint.determinism_check
    if check not in ("default", "none"):
        raise UserError(
            f"activation_checkpoint.determinism_check = {as_text(check)} must be "
            '"default" or "none".'
        )


# Back-ends of torch.compile that choose what the backward pass recomputes.
_BUDGETING = ("inductor", "aot_eager_decomp_partition")


def _check_memory_budget(config: JobConfig) -> None:
    settings, compiler = config.activation_checkpoint, config.compile
    if not 0 <= settings.memory_budget <= 1:
        raise UserError(
            f"activation_checkpoint.memory_budget = {settings.memory_budget} must be between 0 "
            "and 1."
        )
    if settings.mode != "memory_budget":
        if settings.visualize_memory_budget_pareto:
            raise UserError(
                "activation_checkpoint.visualize_memory_budget_pareto = true draws what "
                'activation_checkpoint.mode "memory_budget" chooses from, but the mode is '
                f'"{settings.mode}"; set either.'
            )
        return
    if not compiler.enable or "model" not in compiler.components:
        raise UserError(
            'activation_checkpoint.mode = "memory_budget" is kept to by the compiler: it needs '
            'compile.enable with "model" in compile.components; set them, or another mode.'
        )
    if compiler.backend not in _BUDGETING:
        raise UserError(
            f'compile.backend = "{compiler.backend}" doesn\'t choose what is recomputed, which '
            'activation_checkpoint.mode "memory_budget" needs; set it to "inductor".'
        )


def _check_cpu_offload(config: JobConfig, world_size: int, device_type: str) -> None:
    if not config.training.enable_cpu_offload:
        return
    reason = None
    if device_type == "cpu":
        reason = "moves weights from an accelerator to the CPU, but this run is on the CPU"
    elif world_size == 1:
        reason = "is FSDP's, which one process doesn't use"
    if reason:
        raise UserError(f"training.enable_cpu_offload = true {reason}; set it to false.")


def _check_state_dtype(config: JobConfig) -> None:
    optimizer = config.optimizer
    if optimizer.state_dtype == "float32":
        return
    if optimizer.name != "AdamW":
        raise UserError(
            f'optimizer.state_dtype = "bfloat16" is for AdamW, but optimizer.name is '
            f'{as_text(optimizer.name)}; set state_dtype to "float32".'
        )
    for key in ("beta1", "beta2"):
        beta = getattr(optimizer, key)
        if beta > LARGEST_BF16_BETA:
            raise UserError(
                f'optimizer.{key} = {beta} with optimizer.state_dtype = "bfloat16": a step would '
                "change the running mean by less than bf16 resolves; set it to "
                f'{LARGEST_BF16_BETA} or less, or state_dtype to "float32".'
            )


def _check_profiling(config: JobConfig, device_type: str) -> None:
    profiling = config.profiling
    if profiling.enable_memory_snapshot and device_type != "cuda":
        raise UserError(
            "profiling.enable_memory_snapshot = true needs a CUDA GPU, but this run is on "
            f"{device_type}; set it to false."
        )
    covered = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < covered:
        raise UserError(
            f"profiling.profile_freq = {profiling.profile_freq} is shorter than one trace, "
            f"profiler_warmup ({profiling.profiler_warmup}) + profiler_active "
            f"({profiling.profiler_active}); set it to {covered} or more."
        )


def _check_validation(config: JobConfig) -> None:
    validation = config.validation
    if not validation.enable:
        return
    for name in ("local_batch_size", "seq_len", "freq", "sample_tokens"):
        if getattr(validation, name) < 1:
            raise UserError(f"validation.{name} = {getattr(validation, name)} must be 1 or more.")
    if validation.steps != -1 and validation.steps < 1:
        raise UserError(
            f"validation.steps = {validation.steps} must be 1 or more, or -1 for the whole dataset."
        )
    if "" in validation.sample_prompts:
        raise UserError(
            "validation.sample_prompts holds an empty text; write one, or leave it out."
        )
    split = [f"parallelism.{axis}_parallel_degree" for axis in ("tensor", "context", "pipeline")]
    split = [key for key in split if _get(config, key) > 1]
    if validation.sample_prompts and split:
        raise UserError(
            f"validation.sample_prompts is set, but text is written token by token, which "
            f"{split[0]} = {_get(config, split[0])} can't split; leave it out, and read what "
            "scripts/generate.py writes from a checkpoint."
        )


# ---------------------------------------------------------------------------------------------
# Values together
# ---------------------------------------------------------------------------------------------


def resolve_global_batch_size(config: JobConfig, dp_degree: int) -> int:
    """Sequences per optimizer step, -1 resolved; a multiple of one forward pass of all ranks."""
    wanted, local = config.training.global_batch_size, config.training.local_batch_size
    unit = local * dp_degree
    if wanted == -1:
        return unit
    if wanted < 1 or wanted % unit:
        below = max(wanted // unit, 0) * unit
        raise UserError(
            f"training.global_batch_size = {wanted} must be -1 or a multiple of {unit}, "
            f"training.local_batch_size ({local}) x the data-parallel degree ({dp_degree}); "
            f"set it to {nearest(wanted, [number for number in (below, below + unit) if number])}."
        )
    return wanted


def run_schedule(config: JobConfig, dp_degree: int) -> RunSchedule:
    """The run's phases on so many data-parallel ranks. Raises `UserError` for its batch size."""
    return RunSchedule.of(config, resolve_global_batch_size(config, dp_degree))


def _check_early_step(config: JobConfig, world_size: int) -> None:
    """A step in the backward pass comes before the norm of all gradients, and before the next
    micro-batch.
    """
    if not config.optimizer.early_step_in_backward:
        return
    one_pass = (-1, config.training.local_batch_size)
    rules = [
        ("training.max_norm", (math.inf,), "clipping needs the norm of all gradients"),
        ("training.non_finite_loss", ("rewind", "stop"), "a step that was taken can't be skipped"),
        ("training.loss_spike", ("rewind", "warn"), "a step that was taken can't be skipped"),
        ("training.global_batch_size", one_pass, "a gradient is gone after one forward pass"),
        ("optimizer.implementation", ("fused",), "only this one updates single parameters"),
        ("optimizer.name", ("Adam", "AdamW"), "only these update single parameters"),
        ("optimizer.state_dtype", ("float32",), "only with these single parameters are updated"),
    ]
    for key, allowed, reason in rules:
        if _get(config, key) not in allowed:
            way_out = "inf" if allowed[-1] == math.inf else as_text(allowed[-1])
            raise UserError(
                f"{key} = {as_text(_get(config, key))} can't be had with "
                f"optimizer.early_step_in_backward = true, because {reason}; set it to "
                f"{way_out}, or early_step_in_backward to false."
            )
    if any(phase.batch_size or phase.local_batch_size for phase in config.schedule.phase):
        raise UserError(
            "optimizer.early_step_in_backward = true needs one forward pass a step, but a "
            "schedule.phase sets a batch_size or local_batch_size; leave one of them out."
        )
    if world_size > 1:
        raise UserError(
            "optimizer.early_step_in_backward = true works on one process, but this run has "
            f"{world_size}; set it to false: FSDP spreads gradients over the processes."
        )


# Keys of a phase that change what a forward pass is.
_SHAPES = ("batch_size", "local_batch_size", "seq_len", "yarn")


def _check_cuda_graph(config: JobConfig, world_size: int, device_type: str) -> None:
    """A graph repeats the same kernels on the same memory."""
    if not config.compile.cuda_graph:
        return
    one_pass = (-1, config.training.local_batch_size)
    reason = None
    if device_type != "cuda":
        reason = f"this run is on {device_type}"
    elif world_size > 1:
        reason = f"this run has {world_size}"
    elif config.training.global_batch_size not in one_pass:
        reason = f"training.global_batch_size = {config.training.global_batch_size} takes several"
    elif changed := [key for key in _SHAPES if any(getattr(p, key) for p in config.schedule.phase)]:
        reason = f"a schedule.phase sets {changed[0]}"
    elif config.optimizer.early_step_in_backward:
        reason = "optimizer.early_step_in_backward changes what the pass does from step to step"
    if reason is not None:
        raise UserError(
            "compile.cuda_graph = true is for one process on a CUDA GPU and one forward pass a "
            f"step, but {reason}; set it to false."
        )


def _check_async_tensor_parallel(config: JobConfig, device_type: str) -> None:
    if not config.parallelism.enable_async_tensor_parallel:
        return
    reason = None
    if config.parallelism.tensor_parallel_degree == 1:
        reason = "needs parallelism.tensor_parallel_degree of 2 or more"
    elif device_type != "cuda":
        reason = f"needs CUDA GPUs, but this run is on {device_type}"
    elif not config.compile.enable or "model" not in config.compile.components:
        reason = 'is done by the compiler: it needs compile.enable with "model" in its components'
    if reason:
        raise UserError(
            f"parallelism.enable_async_tensor_parallel = true {reason}; set it to false."
        )
