"""What can be found wrong with a run before a process group or a GPU is touched."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from torchtitan.components.dump_folder import check_dump_folder
from torchtitan.components.hf_checkpoint import check_hf
from torchtitan.components.param_groups import check_groups
from torchtitan.components.tokenizer import Tokenizer, load_tokenizer
from torchtitan.components.validate import check_samples
from torchtitan.config import JobConfig, run_schedule, validate
from torchtitan.config.pipeline import PipelinePlan, plan_pipeline
from torchtitan.config.run_schedule import coefficients_set
from torchtitan.distributed.activation_checkpoint import check_memory_budget
from torchtitan.distributed.compile import check_compile_backend
from torchtitan.hf_datasets import check_training_data
from torchtitan.hf_datasets.validation_data import check_validation_data
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, get_flavor, get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.tools.utils import check_local_processes, device_type

Checked = tuple[TrainSpec, BaseModelArgs, Tokenizer]


def check_config(config: JobConfig) -> Checked:
    """Everything that can be found wrong before a process group or GPU is touched (`UserError`)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    validate(config, world_size, device_type())
    if config.comm.mode == "default":
        check_local_processes(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    check_compile_backend(config.compile)
    check_memory_budget(config.activation_checkpoint)
    spec = get_train_spec(config.model.name)
    model_args = model_args_of(config, spec, config.training.seq_len)
    tokenizer = load_tokenizer(config.model.hf_assets_path)
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
    if config.optimizer.group:
        with torch.device("meta"):
            check_groups(config.optimizer.group, spec.model_cls(model_args))
    if config.compile.cuda_graph and model_args.has_side_losses:
        raise UserError(
            "compile.cuda_graph = true is not supported yet with multi-token prediction "
            "(model.args.n_mtp_layers); set either to false or 0."
        )
    shortest = min([model_args, *_args_of_phases(config, spec)], key=lambda args: args.max_seq_len)
    _check_pipeline(config, model_args)
    check_training_data(config.training, tokenizer)
    check_hf(config, spec, model_args)
    check_samples(config.validation, tokenizer, shortest)
    check_validation_data(config.validation, shortest.max_seq_len)
    check_dump_folder(config.job.dump_folder)
    return spec, model_args, tokenizer


def model_args_of(
    config: JobConfig,
    spec: TrainSpec,
    seq_len: int,
    yarn: str | None = None,
    kept: Mapping[str, Any] | None = None,
) -> BaseModelArgs:
    """Those of the run, for sequences of `seq_len` tokens; yarn takes the place of model.args'.
    kept: of the weights that the run began from (`BaseModelArgs.keep_from`); their YaRN holds
    where "auto" is asked for. Raises `UserError`."""
    flavor = get_flavor(spec, config.model.name, config.model.flavor)
    overrides = config.model.args | dict(kept or {})
    if yarn is not None and not (yarn == "auto" and "yarn" in overrides):
        overrides["yarn"] = yarn
    return flavor.for_run(
        overrides=overrides,
        seq_len=seq_len,
        force_load_balance=config.debug.moe_force_load_balance,
    )


def _args_of_phases(config: JobConfig, spec: TrainSpec) -> list[BaseModelArgs]:
    """The model arguments of each phase of the run."""
    found = []
    ends = run_schedule(config, dp_degree=1).ends[1:]  # sequences are as long on any layout
    for n, (phase, now) in enumerate(zip(config.schedule.phase, ends, strict=True), start=1):
        try:
            found.append(model_args_of(config, spec, now.seq_len, now.yarn))
        except UserError as error:
            raise UserError(f"{phase.title(n)}: {error}") from None
    return found


def pipeline_plan(config: JobConfig, model_args: BaseModelArgs) -> PipelinePlan | None:
    """None without pipeline parallelism. Raises `UserError`."""
    if config.parallelism.pipeline_parallel_degree == 1:
        return None
    return plan_pipeline(
        config.parallelism,
        num_layers=model_args.n_layers,
        local_batch_size=config.training.local_batch_size,
    )


def _check_pipeline(config: JobConfig, model_args: BaseModelArgs) -> None:
    """Each batch that will pass through it must be one for its schedule, and each layer, too."""
    plan = pipeline_plan(config, model_args)
    if plan is None:
        return
    compiles = config.compile.enable and "model" in config.compile.components
    if compiles and plan.splits_backward and torch.__version__ < (2, 13):
        other = 'set parallelism.pipeline_parallel_schedule to "Interleaved1F1B"'
        if plan.file is not None:
            other = "name a file without I and W"
        raise UserError(
            f"compile.enable = true can't be had with the pipeline schedule '{plan.schedule}' on "
            f"torch {torch.__version__}, which can't split the backward pass of a compiled layer; "
            f"{other}, set compile.enable to false, or install torch 2.13 or later."
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
