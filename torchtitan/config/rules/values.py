"""Rules for single settings: unsupported values, ranges, choices; and for small tables."""

import math
import re
from collections.abc import Callable
from typing import Any

from torchtitan.config.blend import check_names
from torchtitan.config.job_config import JobConfig, Validation
from torchtitan.config.schema import as_text, value_of
from torchtitan.tools.errors import UserError, suggest

# ---------------------------------------------------------------------------------------------
# Features that are not supported yet
# ---------------------------------------------------------------------------------------------

# key, allowed values, the feature. Keys that only shape one of these features (the pipeline
# schedule, checkpoint.interval, [quantize], ...) have no effect without it and may have any value.
_NOT_YET: list[tuple[str, tuple[Any, ...], str]] = [
    ("comm.mode", ("default", "fake_backend"), "the local-tensor mode"),
]


def check_supported(config: JobConfig) -> None:
    for key, allowed, feature in _NOT_YET:
        value = value_of(config, key)
        if value not in allowed:
            choices = " or ".join(as_text(choice) for choice in allowed)
            raise UserError(
                f"{feature} is not supported yet, but {key} = {as_text(value)}; "
                f"set it to {choices}."
            )


def check_renamed(config: JobConfig) -> None:
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
# Values
# ---------------------------------------------------------------------------------------------

# The rule in words, the rule as a test, and its keys; a key may be unset (None). NaN fails every
# comparison, so no rule needs to mention it.
_RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "1 or more",
        lambda value: value >= 1,
        "training.local_batch_size training.seq_len training.steps training.gc_freq "
        "training.dataset_lanes "
        "metrics.log_freq profiling.profile_freq profiling.profiler_active "
        "comm.init_timeout_seconds comm.train_timeout_seconds checkpoint.interval "
        "ema.interval parallelism.expert_parallel_capacity chat.look_ahead",
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        "metrics.waiting_freq metrics.routing_moved_freq lr_scheduler.warmup_steps "
        "training.dataset_num_workers profiling.profiler_warmup "
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


def check_ranges(config: JobConfig) -> None:
    for rule, holds, keys in _RANGES:
        for key in keys.split():
            value = value_of(config, key)
            if value is not None and not holds(value):
                raise UserError(f"{key} = {as_text(value)} must be {rule}.")


def check_choices(config: JobConfig) -> None:
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


def check_profiling(config: JobConfig, device_type: str) -> None:
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


def check_validation(config: JobConfig) -> None:
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
    _check_sets(validation)
    if "" in validation.sample_prompts:
        raise UserError(
            "validation.sample_prompts holds an empty text; write one, or leave it out."
        )
    split = _splits_sequences_or_layers(config)
    if validation.sample_prompts and split:
        raise UserError(
            f"validation.sample_prompts is set, but text is generated token by token, which "
            f"{split} can't split; leave it out (on the command line: "
            "--validation.sample_prompts=[]), and use scripts/generate.py with a checkpoint."
        )


def _splits_sequences_or_layers(config: JobConfig) -> str | None:
    keys = [f"parallelism.{axis}_parallel_degree" for axis in ("tensor", "context", "pipeline")]
    return next((f"{k} = {value_of(config, k)}" for k in keys if value_of(config, k) > 1), None)


def _check_sets(validation: Validation) -> None:
    check_names("validation.sets", [each.name for each in validation.sets])
    for key in ("dataset", "dataset_path", "dataset_text_key", "format"):
        value = getattr(validation, key)
        if validation.sets and value != getattr(Validation(), key):
            raise UserError(
                f"validation.{key} = {as_text(value)} and [[validation.sets]] both set the data to "
                "read; leave one out (on the command line with --validation.sets=[])."
            )
