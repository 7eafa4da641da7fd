"""Rules for settings of two tables, or of a table and the device."""

import math

from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import as_text, value_of
from torchtitan.tools.errors import UserError

# Back-ends of torch.compile that choose what the backward pass recomputes.
_BUDGETING = ("inductor", "aot_eager_decomp_partition")


def check_memory_budget(config: JobConfig) -> None:
    settings, compiler = config.activation_checkpoint, config.compile
    if not 0 <= settings.memory_budget <= 1:
        raise UserError(
            f"activation_checkpoint.memory_budget = {settings.memory_budget} must be between 0 "
            "and 1."
        )
    if settings.mode != "memory_budget":
        if settings.visualize_memory_budget_pareto:
            raise UserError(
                "activation_checkpoint.visualize_memory_budget_pareto = true draws the choices of "
                'activation_checkpoint.mode "memory_budget", but the mode is '
                f'"{settings.mode}"; change one of them.'
            )
        return
    if not compiler.enable or "model" not in compiler.components:
        raise UserError(
            'activation_checkpoint.mode = "memory_budget" is implemented by the compiler: it needs '
            'compile.enable with "model" in compile.components; set them, or another mode.'
        )
    if compiler.backend not in _BUDGETING:
        raise UserError(
            f'compile.backend = "{compiler.backend}" doesn\'t choose what is recomputed, which '
            'activation_checkpoint.mode "memory_budget" needs; set it to "inductor".'
        )


def check_cpu_offload(config: JobConfig, world_size: int, device_type: str) -> None:
    if not config.training.enable_cpu_offload:
        return
    reason = None
    if device_type == "cpu":
        reason = "moves weights from an accelerator to the CPU, but this run is on the CPU"
    elif world_size == 1:
        reason = "needs FSDP, which one process doesn't use"
    if reason:
        raise UserError(f"training.enable_cpu_offload = true {reason}; set it to false.")


def check_early_step(config: JobConfig, world_size: int) -> None:
    """Raise `UserError` for settings that an optimizer step in the backward pass excludes.

    It comes before the norm of all gradients is known, and before the next micro-batch.
    """
    if not config.optimizer.early_step_in_backward:
        return
    one_pass = (-1, config.training.local_batch_size)
    rules = [
        ("training.max_norm", (math.inf,), "clipping needs the norm of all gradients"),
        ("training.non_finite_loss", ("rewind", "stop"), "a finished step can't be skipped"),
        ("training.loss_spike", ("rewind", "warn"), "a finished step can't be skipped"),
        ("training.global_batch_size", one_pass, "a gradient is freed after one forward pass"),
        ("optimizer.implementation", ("fused",), 'only "fused" updates single parameters'),
        ("optimizer.name", ("Adam", "AdamW"), "only Adam and AdamW update single parameters"),
        ("optimizer.state_dtype", ("float32",), "bf16 states are updated all at once"),
    ]
    for key, allowed, reason in rules:
        if value_of(config, key) not in allowed:
            way_out = "inf" if allowed[-1] == math.inf else as_text(allowed[-1])
            raise UserError(
                f"{key} = {as_text(value_of(config, key))} is not supported with "
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


# Keys of a phase that change the shape of a forward pass.
_SHAPES = ("batch_size", "local_batch_size", "seq_len", "yarn")


def check_cuda_graph(config: JobConfig, device_type: str) -> None:
    """Raise `UserError` for settings that exclude a graph, which repeats the same kernels on the
    same memory."""
    if not config.compile.cuda_graph:
        return
    parallelism, reason = config.parallelism, None
    if device_type != "cuda":
        reason = f"this run is on {device_type}"
    elif parallelism.pipeline_parallel_degree > 1:
        reason = "parallelism.pipeline_parallel_degree cuts the passes in pieces"
    elif config.training.enable_cpu_offload:
        reason = "training.enable_cpu_offload waits for the host"
    elif changed := [key for key in _SHAPES if any(getattr(p, key) for p in config.schedule.phase)]:
        reason = f"a schedule.phase sets {changed[0]}"
    elif config.optimizer.early_step_in_backward:
        reason = "optimizer.early_step_in_backward changes the pass from step to step"
    if reason is not None:
        raise UserError(
            "compile.cuda_graph = true is for CUDA GPUs and passes that are the same in every "
            f"step, but {reason}; set it to false."
        )


def check_async_tensor_parallel(config: JobConfig, device_type: str) -> None:
    if not config.parallelism.enable_async_tensor_parallel:
        return
    reason = None
    if config.parallelism.tensor_parallel_degree == 1:
        reason = "needs parallelism.tensor_parallel_degree of 2 or more"
    elif device_type != "cuda":
        reason = f"needs CUDA GPUs, but this run is on {device_type}"
    elif not config.compile.enable or "model" not in config.compile.components:
        reason = 'needs the compiler: compile.enable with "model" in compile.components'
    if reason:
        raise UserError(
            f"parallelism.enable_async_tensor_parallel = true {reason}; set it to false."
        )
