"""Name the nearest change with which a run fits, by key."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.planning.plan import Plan
from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.sweep import estimate
from torchtitan.planning.trace import Traces
from torchtitan.tools.errors import UserError

_MOST_GPUS = 16  # times as many as asked for


def nearest_fit(plan: Plan, skew: float) -> str:
    """Return a sentence on the first change that fits: of one key, of two, of the number of GPUs.

    skew: largest load of an expert over the mean.
    """
    run, hardware = plan.run, plan.hardware
    config = replace(
        run.config,
        schedule=replace(run.config.schedule, phase=[]),
        training=replace(run.config.training, global_batch_size=run.now.batch_size),
        parallelism=replace(run.config.parallelism, expert_parallel_node_size=None),
    )
    traced: dict[tuple, Traces] = {}
    for changes in _changes(run, config):
        try:
            other = estimate(_with(config, changes), run.world_size, hardware, skew, traced)
        except UserError:
            continue
        if other.fits:
            keys = " and ".join(f"{key} = {_text(value)}" for key, value in changes.items())
            return f"The nearest change that fits: {keys} ({_needs(other)})."
    return _more_gpus(run, config, plan, skew, traced)


def _more_gpus(
    run: PlannedRun, config: JobConfig, plan: Plan, skew: float, traced: dict[tuple, Traces]
) -> str:
    full = _with(config, {"activation_checkpoint.mode": "full"})
    world_size = run.world_size
    while world_size < _MOST_GPUS * run.world_size:
        world_size *= 2
        try:
            other = estimate(
                _with(full, {"training.global_batch_size": -1}),
                world_size,
                plan.hardware,
                skew,
                traced,
            )
        except UserError:
            continue
        if other.fits:
            return (
                f"No single change fits on {run.world_size:,} GPUs; with "
                f'activation_checkpoint.mode = "full" it fits on {world_size:,} ({_needs(other)}).'
            )
    return (
        f"Nothing that was tried fits on up to {world_size:,} GPUs: raise "
        "parallelism.expert_parallel_degree and pipeline_parallel_degree, or take a smaller model."
    )


def _needs(plan: Plan) -> str:
    return (
        f"{plan.hardware.needed_gib(plan.worst.peak.total):.1f} of "
        f"{plan.hardware.memory_gib:g} GiB, "
        f"{plan.speed.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
    )


def _changes(run: PlannedRun, config: JobConfig) -> Iterator[dict[str, Any]]:
    """Yield changes from cheap to dear: weights gathered twice, recomputation, smaller passes, bf16
    states, degrees."""
    recompute, local = config.activation_checkpoint, config.training.local_batch_size
    if run.pipeline is None and run.world_size > 1 and not run.reshards:
        yield {"parallelism.fsdp_reshard_after_forward": "always"}
    by_op = {"activation_checkpoint.selective_ac_option": "op"}
    if recompute.mode != "selective":
        by_op = {"activation_checkpoint.mode": "selective"} | by_op
    if recompute.mode != "full":
        if recompute.mode == "none" or recompute.selective_ac_option != "op":
            yield by_op
        yield {"activation_checkpoint.mode": "full"}
    if run.pipeline is None:
        sizes = [n for n in range(local - 1, 0, -1) if local % n == 0]
        yield from ({"training.local_batch_size": n} for n in sizes)
    full = {"activation_checkpoint.mode": "full"} if recompute.mode != "full" else {}
    if run.pipeline is None and local > 1:
        yield full | {"training.local_batch_size": 1}
    if config.optimizer.name == "AdamW" and config.optimizer.state_dtype == "float32":
        yield {"optimizer.state_dtype": "bfloat16"}
        yield full | {"optimizer.state_dtype": "bfloat16"}
    d = run.degrees
    for name, degree in (("expert_parallel", d.ep), ("tensor_parallel", d.tp)):
        for factor in (2, 4, 8):
            yield full | {f"parallelism.{name}_degree": degree * factor}
    yield from (full | {"parallelism.pipeline_parallel_degree": d.pp * n} for n in (2, 4, 8))


def _with(config: JobConfig, changes: dict[str, Any]) -> JobConfig:
    for key, value in changes.items():
        table, name = key.split(".")
        config = replace(config, **{table: replace(getattr(config, table), **{name: value})})
    return config


def _text(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
