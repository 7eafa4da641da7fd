"""Checks of a run before a process group or a GPU is used."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchtitan.components.checkpoint.hf_rules import check_hf
from torchtitan.components.dump_folder import check_folders
from torchtitan.components.finetuning.trained import is_finetuning, make_whole_model
from torchtitan.components.huggingface.sizes import flavor_of
from torchtitan.components.metrics.wandb_writer import check_wandb
from torchtitan.components.optimizer.param_groups import check_groups
from torchtitan.components.quantize.float8 import check_float8_device, uses_float8
from torchtitan.components.validate import check_samples
from torchtitan.config import JobConfig, resolve_degrees, run_schedule, validate
from torchtitan.config.manager import read_config_file
from torchtitan.config.phases import coefficients_set
from torchtitan.data import check_training_data
from torchtitan.data.tokenizer import Tokenizer, load_tokenizer
from torchtitan.data.training import check_chat
from torchtitan.data.validation import check_validation_data
from torchtitan.distributed.activation_checkpoint import check_memory_budget
from torchtitan.distributed.compile import check_compile_backend
from torchtitan.distributed.pipeline_plan import PipelinePlan, plan_pipeline
from torchtitan.ops import cudnn_documents
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools.disk import check_readable
from torchtitan.tools.errors import UserError
from torchtitan.tools.launcher import planned_processes
from torchtitan.tools.utils import check_local_processes, device_type

Checked = tuple[TrainSpec, BaseModelArgs, Tokenizer]


def check_config(config: JobConfig) -> Checked:
    """Check all that can be checked before a process group or GPU is used. Raises `UserError`."""
    world_size, local_world_size = planned_processes()
    validate(config, world_size, device_type())
    if config.comm.mode == "default":
        check_local_processes(local_world_size or 1)
    check_folders(config, device_type())
    check_readable("model.hf_assets_path", config.model.hf_assets_path)
    check_compile_backend(config.compile)
    check_memory_budget(config.activation_checkpoint)
    check_wandb(config.metrics.enable_wandb)
    check_float8_device(config, torch.device(device_type()))
    spec = get_train_spec(config.model.name)
    model_args = model_args_of(config, spec, config.training.seq_len)
    tokenizer = load_tokenizer(config.model.hf_assets_path, spec.hf_repos.get(config.model.flavor))
    if tokenizer.vocab_size > model_args.vocab_size:
        raise UserError(
            f"the tokenizer in model.hf_assets_path ({config.model.hf_assets_path}) has "
            f"{tokenizer.vocab_size} tokens, but model.flavor '{config.model.flavor}' only "
            f"{model_args.vocab_size}: set model.args.vocab_size to at least "
            f"{tokenizer.vocab_size}, or name the tokenizer of this model."
        )
    model_args.check_tokenizer(tokenizer.eos_id)
    model_args.check_coefficients(coefficients_set(config.schedule.phase))
    model_args.check_layout(config.parallelism)
    if config.optimizer.group or is_finetuning(config) or uses_float8(config):
        check_groups(config.optimizer.group, make_whole_model(spec, model_args, config))
    if config.compile.cuda_graph and model_args.has_side_losses:
        raise UserError(
            "compile.cuda_graph = true is not supported yet with multi-token prediction "
            "(model.args.n_mtp_layers); set either to false or 0."
        )
    check_graphed_documents(config, model_args)
    shortest = min([model_args, *_args_of_phases(config, spec)], key=lambda args: args.max_seq_len)
    check_pipeline(config, model_args)
    check_training_data(config.training, tokenizer)
    check_chat(config, tokenizer, model_args)
    check_hf(config, spec, model_args)
    check_samples(config, tokenizer, shortest)
    check_validation_data(config.validation, shortest.max_seq_len)
    return spec, model_args, tokenizer


def check_graphed_documents(config: JobConfig, model_args: BaseModelArgs) -> None:
    """Raise `UserError` where a CUDA graph can't follow packed documents: in every batch they lie
    elsewhere."""
    if not (config.compile.cuda_graph and model_args.keeps_documents_apart):
        return
    degree, reason = config.parallelism.context_parallel_degree, None
    if config.debug.deterministic:
        reason = "debug.deterministic excludes it; set either key to false"
    elif degree > 1:
        reason = (
            f"parallelism.context_parallel_degree = {degree} excludes it; set it to 1, or "
            "compile.cuda_graph to false"
        )
    elif config.training.mixed_precision_param == "float32":
        reason = (
            'training.mixed_precision_param = "float32" excludes it; set it to "bfloat16", or '
            "compile.cuda_graph to false"
        )
    elif model_args.head_channels not in cudnn_documents.PROVEN:
        reason = "heads of {} and {} channels have another; set compile.cuda_graph to false".format(
            *model_args.head_channels
        )
    elif cudnn_documents.package() is None:
        reason = (
            "its package is not installed; `pip install nvidia-cudnn-frontend`, or set "
            "compile.cuda_graph to false"
        )
    if reason is not None:
        raise UserError(
            "compile.cuda_graph = true with packed documents (model.args.attn_mask_type "
            f"'block_causal') needs cuDNN's kernel for all of them, but {reason}."
        )


def model_args_of(
    config: JobConfig,
    spec: TrainSpec,
    seq_len: int,
    yarn: str | None = None,
    kept: Mapping[str, Any] | None = None,
) -> BaseModelArgs:
    """Model arguments of the run, for sequences of `seq_len` tokens. Raises `UserError`.

    yarn: overrides model.args.yarn.
    kept: arguments of the weights that the run began from (`BaseModelArgs.keep_from`); with yarn
        "auto" their YaRN is kept.
    """
    flavor = flavor_of(config, spec)

    def args_for(overrides: dict[str, Any]) -> BaseModelArgs:
        overrides = overrides | dict(kept or {})
        if yarn is not None and not (yarn == "auto" and "yarn" in overrides):
            overrides["yarn"] = yarn
        return flavor.for_run(
            overrides=overrides,
            seq_len=seq_len,
            force_load_balance=config.debug.moe_force_load_balance,
        )

    try:
        return args_for(config.model.args)
    except UserError as error:
        file = config.job.config_file
        if file and _is_refused(args_for, read_config_file(file).get("model.args", {}), error):
            raise UserError(f"{file}: {error}") from None
        raise


def _is_refused(make: Callable[[dict[str, Any]], Any], overrides: Any, error: UserError) -> bool:
    """Tell whether these settings alone, without the command line's, lead to the same error."""
    try:
        make(overrides)
    except UserError as own:
        return bool(overrides) and str(own) == str(error)
    return False


def describe(config: JobConfig, checked: Checked) -> str:
    """Summarise a config that can run, for --job.check_config."""
    _, model_args, _ = checked
    processes, _ = planned_processes()
    degrees = resolve_degrees(config.parallelism, processes)
    first = run_schedule(config, degrees.dp_replicate * degrees.dp_shard).at(0)
    layout = " x ".join(f"{name} {n}" for name, n in degrees._asdict().items() if n > 1)
    return (
        f"The config fits: {processes} process{'es' if processes > 1 else ''}"
        f"{f' ({layout})' if layout else ''}, {config.model.name} {config.model.flavor} with "
        f"{_short(model_args.num_weights)} parameters, {config.training.steps:,} steps of "
        f"{first.batch_size} sequences of {first.seq_len} tokens. Its data was not read."
    )


def _short(number: int) -> str:
    """Write a number in three digits: 671 B."""
    for unit, size in {"T": 10**12, "B": 10**9, "M": 10**6, "k": 10**3}.items():
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _args_of_phases(config: JobConfig, spec: TrainSpec) -> list[BaseModelArgs]:
    """List the model arguments of each phase of the run."""
    found = []
    ends = run_schedule(config, dp_degree=1).ends[1:]  # sequences are as long on any layout
    for n, (phase, now) in enumerate(zip(config.schedule.phase, ends, strict=True), start=1):
        try:
            found.append(model_args_of(config, spec, now.seq_len, now.yarn))
        except UserError as error:
            raise UserError(f"{phase.title(n)}: {error}") from None
    return found


def pipeline_plan(config: JobConfig, model_args: BaseModelArgs) -> PipelinePlan | None:
    """Plan the pipeline; None without pipeline parallelism. Raises `UserError`."""
    if config.parallelism.pipeline_parallel_degree == 1:
        return None
    return plan_pipeline(
        config.parallelism,
        num_layers=model_args.n_layers,
        local_batch_size=config.training.local_batch_size,
    )


def check_pipeline(config: JobConfig, model_args: BaseModelArgs) -> None:
    """Check that the pipeline's schedule supports this torch, and each batch size of the run."""
    plan = pipeline_plan(config, model_args)
    if plan is None:
        return
    if plan.splits_backward and torch.__version__ < "2.13":
        other = 'set parallelism.pipeline_parallel_schedule to "Interleaved1F1B"'
        if plan.file is not None:
            other = "name a file without I and W in parallelism.pipeline_parallel_schedule_csv"
        raise UserError(
            f"The pipeline schedule '{plan.schedule}' splits backward passes, which torch "
            f"{torch.__version__} can't do for experts and compiled layers; {other}, or install "
            "torch 2.13 or later."
        )
    sizes = {
        f"{phase.title(n)} local_batch_size": phase.local_batch_size
        for n, phase in enumerate(config.schedule.phase, start=1)
    }
    if config.validation.enable:
        sizes["validation.local_batch_size"] = config.validation.local_batch_size
    for key, size in sizes.items():
        if size is not None:
            plan_pipeline(
                config.parallelism,
                num_layers=model_args.n_layers,
                local_batch_size=size,
                batch_key=key,
            )
