"""What can be found wrong with a run before a process group or a GPU is touched."""

import os

import torch

from torchtitan.components.dump_folder import check_dump_folder
from torchtitan.components.hf_checkpoint import check_hf
from torchtitan.components.param_groups import check_groups
from torchtitan.components.schedule import coefficients_set
from torchtitan.components.tokenizer import Tokenizer, load_tokenizer
from torchtitan.components.validate import check_samples
from torchtitan.config import JobConfig, validate
from torchtitan.config.pipeline import PipelinePlan, plan_pipeline
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
    model_args = get_flavor(spec, config.model.name, config.model.flavor).for_run(
        overrides=config.model.args,
        seq_len=config.training.seq_len,
        force_load_balance=config.debug.moe_force_load_balance,
    )
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
    pipeline_plan(config, model_args)
    check_training_data(config.training, tokenizer)
    check_hf(config, spec, model_args)
    check_samples(config.validation, tokenizer, model_args)
    check_validation_data(config.validation, model_args.max_seq_len)
    check_dump_folder(config.job.dump_folder)
    return spec, model_args, tokenizer


def pipeline_plan(config: JobConfig, model_args: BaseModelArgs) -> PipelinePlan | None:
    """None without pipeline parallelism. Raises `UserError`."""
    if config.parallelism.pipeline_parallel_degree == 1:
        return None
    return plan_pipeline(
        config.parallelism,
        num_layers=model_args.n_layers,
        local_batch_size=config.training.local_batch_size,
    )
