"""Builders of a run's parts: each makes one part from the config and the parts built before it."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchtitan.components.finetuning.trained import make_whole_model
from torchtitan.components.metrics.logger import MetricsLogger, device_name
from torchtitan.components.optimizer import lr_scheduler
from torchtitan.config import JobConfig, Parallelism, resolve_degrees, run_schedule, to_dict
from torchtitan.config.phases import RunSchedule
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.dry_run import check_room
from torchtitan.distributed.fsdp import materialize
from torchtitan.distributed.pipeline_parallel import Pipeline, cut_into_parts
from torchtitan.distributed.pipeline_plan import PipelinePlan
from torchtitan.ops.lora import is_adapter
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.flops import peak_flops
from torchtitan.tools.launcher import planned_processes
from torchtitan.tools.logging import logger
from torchtitan.tools.profiling import RequestedTraces, maybe_memory_snapshot, maybe_profile
from torchtitan.tools.utils import TORCH_DTYPES, device_type


def build_model(
    spec: TrainSpec,
    model_args: BaseModelArgs,
    dims: ParallelDims,
    config: JobConfig,
    device: torch.device,
    plan: PipelinePlan | None = None,
) -> tuple[BaseModel, list[BaseModel]]:
    """Make the model on the meta device, spread it over ranks (`shape_model`), then fill this
    rank's part.

    Returns the model and, with a pipeline, its parts by stage.
    """
    model, parts = shape_model(spec, model_args, dims, config, plan)
    if config.comm.mode == "fake_backend":
        check_room(model, device)
    materialize(model, device, offload=config.training.enable_cpu_offload)
    model.init_weights(buffer_device=device)
    return model.train(), parts


def shape_model(
    spec: TrainSpec,
    model_args: BaseModelArgs,
    dims: ParallelDims,
    config: JobConfig,
    plan: PipelinePlan | None = None,
) -> tuple[BaseModel, list[BaseModel]]:
    """Build the model on the meta device, spread over ranks, without values. Returns it and its
    parts, as `build_model` does."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[config.training.dtype])
    try:
        model = make_whole_model(spec, model_args, config)
    finally:
        torch.set_default_dtype(default_dtype)
    num_params = sum(p.numel() for name, p in model.named_parameters() if not is_adapter(name))
    logger.info(
        "Model: %s %s, %s parameters", config.model.name, config.model.flavor, f"{num_params:,}"
    )
    parts = cut_into_parts(model, plan, dims.mesh["pp"].get_local_rank()) if plan else []
    for part in parts or [model]:
        spec.parallelize_fn(part, dims, config)
    return model, parts


def build_parallel_dims(config: JobConfig, plan: PipelinePlan | None = None) -> ParallelDims:
    world_size = dist.get_world_size()
    dims = ParallelDims(
        last_stage=plan.rank_of(len(plan.stages) - 1) if plan else 0,
        world_size=world_size,
        device_type=device_type(),
        node_size=resolve_node_size(config.parallelism, world_size),
        **resolve_degrees(config.parallelism, world_size)._asdict(),
    )
    dims.make_groups()
    return dims


def resolve_node_size(parallelism: Parallelism, world_size: int, local: int | None = None) -> int:
    """Consecutive ranks of one node: from the config, else `local`, else from torchrun, else all
    ranks.

    Where EP groups don't fit torchrun's nodes, the largest size that divides both is used: for EP
    groups of 12 ranks on nodes of 8, a "node" of 4 ranks, so that no "node" spans two real ones.
    """
    if parallelism.expert_parallel_node_size is not None:
        return parallelism.expert_parallel_node_size
    local = local or planned_processes()[1] or world_size
    span = parallelism.expert_parallel_degree * parallelism.expert_tensor_parallel_degree
    return local if 0 in (local % span, span % local) else math.gcd(local, span)


def build_schedule(config: JobConfig, dp_degree: int) -> RunSchedule:
    schedule = run_schedule(config, dp_degree)
    if schedule.phases:
        num_steps = schedule.num_steps()
        text = f"Schedule: {len(schedule.phases)} phases end after step {num_steps}"
        if config.training.steps == num_steps:
            logger.info("%s, as does the run", text)
        else:
            logger.warning("%s, but training.steps = %d", text, config.training.steps)
    return schedule


def build_metrics(config: JobConfig, device: torch.device, start_step: int) -> MetricsLogger:
    settings, compute_dtype = config.metrics, TORCH_DTYPES[config.training.mixed_precision_param]
    return MetricsLogger(
        dump_folder=config.job.dump_folder,
        log_freq=settings.log_freq,
        total_steps=config.training.steps,
        enable_tensorboard=settings.enable_tensorboard,
        save_tb_folder=settings.save_tb_folder,
        save_for_all_ranks=settings.save_for_all_ranks,
        disable_color_printing=settings.disable_color_printing,
        device=device,
        peak_flops=peak_flops(device_name(device), compute_dtype),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        start_step=start_step,
        enable_report=settings.enable_report,
        wandb_config=to_dict(config) if settings.enable_wandb else None,
    )


def build_lr_scheduler(
    config: JobConfig, optimizer: Optimizer, schedule: RunSchedule, tokens_seen: Callable[[], int]
) -> LambdaLR:
    """Build the scheduler: by steps, or by the tokens of `schedule` where it has phases."""
    settings = config.lr_scheduler
    if not schedule.phases:
        return lr_scheduler.build_lr_scheduler(
            optimizer, total_steps=config.training.steps, **asdict(settings)
        )
    return lr_scheduler.build_phase_lr_scheduler(
        optimizer,
        lambda: schedule.at(tokens_seen()).lr,
        lr=config.optimizer.lr,
        warmup_steps=settings.warmup_steps,
    )


def build_pipeline(
    config: JobConfig,
    model_args: BaseModelArgs,
    dims: ParallelDims,
    parts: list[BaseModel],
    plan: PipelinePlan,
    **how: Any,
) -> Pipeline:
    """Build this rank's pipeline.

    parts: from `build_model`.
    how: `device`, `loss_fn` and `masks_of` of `Pipeline`.
    """
    vocab_parts = 1 if config.parallelism.disable_loss_parallel else dims.tp
    return Pipeline(
        parts,
        plan,
        mesh=dims.mesh["pp"],
        hidden=model_args.stage_channels,
        vocab=model_args.vocab_size // vocab_parts,
        split=dims.tp,
        dtype=TORCH_DTYPES[config.training.mixed_precision_param],
        overlap=config.parallelism.pipeline_parallel_expert_parallel_overlap and dims.ep > 1,
        **how,
    )


@contextmanager
def profilers(
    config: JobConfig, rank: int, start_step: int, *, asked: Callable[[], bool], waiting_freq: int
) -> Iterator[Callable[[], None]]:
    """Record the traces and memory snapshots of [profiling], and those asked for by SIGUSR2; call
    the yielded function after every step.

    asked: whether a trace was asked for since its last call.
    waiting_freq: steps between those that `WaitProfile` profiles; 0 = none.
    """
    settings = config.profiling
    where = {"dump_folder": config.job.dump_folder, "rank": rank, "start_step": start_step}
    with (
        maybe_profile(
            enable_profiling=settings.enable_profiling,
            save_traces_folder=settings.save_traces_folder,
            profile_freq=settings.profile_freq,
            profiler_active=settings.profiler_active,
            profiler_warmup=settings.profiler_warmup,
            **where,
        ) as profiler,
        maybe_memory_snapshot(
            enable_memory_snapshot=settings.enable_memory_snapshot,
            save_memory_snapshot_folder=settings.save_memory_snapshot_folder,
            profile_freq=settings.profile_freq,
            **where,
        ) as snapshots,
        closing(
            RequestedTraces(
                asked,
                Path(config.job.dump_folder, settings.save_traces_folder),
                Path(config.job.dump_folder, settings.save_memory_snapshot_folder),
                active=settings.profiler_active,
                warmup=settings.profiler_warmup,
                start_step=start_step,
                rank=rank,
                busy_freq=waiting_freq,
                scheduled=settings.enable_profiling,
                snapshots_scheduled=settings.enable_memory_snapshot,
            )
        ) as requested,
    ):

        def after_step() -> None:
            profiler.step()
            snapshots.step()
            requested.step()

        yield after_step
