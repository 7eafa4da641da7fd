"""Layouts of a run compared: those that fit by speed, and why the others don't."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.planning.closed import closed_state
from torchtitan.planning.elements import Elements
from torchtitan.planning.hardware import Hardware
from torchtitan.planning.plan import Plan, assemble
from torchtitan.planning.ranks import PlannedRun, plan_run
from torchtitan.planning.trace import Traces, trace_run
from torchtitan.planning.traffic import groups
from torchtitan.tools.errors import UserError
from torchtitan.tools.progress_bar import track

# By what the table calls them: mode and option of [activation_checkpoint].
RECOMPUTED = {"none": ("none", "2"), "op": ("selective", "op"), "full": ("full", "2")}
_MOST_STAGES = 32


@dataclass(frozen=True)
class Row:
    """One layout of the sweep.

    layout: degrees and recomputation, by name.
    reason: why it can't run, or "".
    """

    layout: dict[str, Any]
    reason: str = ""
    gib: float = 0.0
    tokens_per_second_per_gpu: float = 0.0
    mfu: float = 0.0
    step_seconds: float = 0.0


def sweep(
    config: JobConfig, world_size: int, hardware: Hardware, *, skew: float, phase: int
) -> list[Row]:
    """Plan layouts with the config's global batch; those that fit come first, by speed."""
    run = plan_run(config, world_size, gpus_per_node=hardware.gpus_per_node, phase=phase)
    traced: dict[tuple, Traces] = {}
    layouts = list(_layouts(run))
    tried = track(layouts, len(layouts), "planning", "layout")
    rows = [_try(run, hardware, layout, skew, traced) for layout in tried]
    return sorted(rows, key=lambda row: (bool(row.reason), -row.tokens_per_second_per_gpu))


def _layouts(run: PlannedRun) -> Iterator[dict[str, Any]]:
    d = run.degrees
    experts = run.model_args.moe_args.num_experts if run.model_args.has_experts else 1
    stages = sorted({1, d.pp, *(n for n in (2, 4, 8, 16) if n <= run.model_args.n_layers // 2)})
    spread = sorted({d.ep, *(n for n in (1, 8, 32, 64) if experts % n == 0 and n <= experts)})
    tensors = sorted({1, d.tp})
    for pp, tp, ep, recomputed in product(stages, tensors, spread, RECOMPUTED):
        if pp <= min(_MOST_STAGES, run.world_size) and ep <= run.world_size:
            yield {"pp": pp, "tp": tp, "ep": ep, "recompute": recomputed}


def with_layout(run: PlannedRun, layout: dict[str, Any]) -> JobConfig:
    """Return the run's config in another layout, with its global batch. Raises `UserError`."""
    config, pp = run.config, layout["pp"]
    parallelism = replace(
        config.parallelism,
        pipeline_parallel_degree=pp,
        tensor_parallel_degree=layout["tp"],
        expert_parallel_degree=layout["ep"],
        expert_tensor_parallel_degree=1,
        expert_parallel_node_size=None,
        data_parallel_shard_degree=-1,
        data_parallel_replicate_degree=1,
    )
    if pp != run.degrees.pp:
        parallelism = replace(
            parallelism,
            module_fqns_per_model_part=None,
            pipeline_parallel_schedule_csv="",
            pipeline_parallel_layers_per_stage=None,
            pipeline_parallel_first_stage_less_layers=0,
            pipeline_parallel_last_stage_less_layers=0,
        )
    mode, option = RECOMPUTED[layout["recompute"]]
    dp = max(1, run.world_size // (pp * layout["tp"] * run.degrees.cp))
    training = replace(
        config.training,
        local_batch_size=_local_batch(run, pp, dp),
        global_batch_size=run.now.batch_size,
        seq_len=run.now.seq_len,
    )
    recompute = replace(config.activation_checkpoint, mode=mode, selective_ac_option=option)
    return replace(
        config,
        parallelism=parallelism,
        training=training,
        activation_checkpoint=recompute,
        schedule=replace(config.schedule, phase=[]),
    )


def _local_batch(run: PlannedRun, pp: int, dp: int) -> int:
    """Return the sequences of a pass: with a pipeline a rank's whole batch, else those of a pass of
    the planned run, or of its pipeline's micro-batch."""
    share = max(1, run.now.batch_size // dp)
    return share if pp > 1 else min(share, run.microbatch)


def _try(
    run: PlannedRun,
    hardware: Hardware,
    layout: dict[str, Any],
    skew: float,
    traced: dict[tuple, Traces],
) -> Row:
    try:
        plan = estimate(with_layout(run, layout), run.world_size, hardware, skew, traced)
    except UserError as error:
        return Row(layout, str(error))
    gib = hardware.needed_gib(plan.worst.peak.total)
    reason = "" if plan.fits else f"needs {gib:.1f} of {hardware.memory_gib:g} GiB"
    speed = plan.speed
    return Row(
        layout,
        reason,
        gib,
        speed.tokens_per_second_per_gpu,
        speed.mfu,
        plan.time.seconds,
    )


def estimate(
    config: JobConfig,
    world_size: int,
    hardware: Hardware,
    skew: float,
    traced: dict[tuple, Traces] | None = None,
) -> Plan:
    """Plan a run whose state is counted by arithmetic.

    traced: traces of earlier layouts, for those whose layers are the same; added to.
    """
    run = plan_run(config, world_size, gpus_per_node=hardware.gpus_per_node)
    d, now = run.degrees, run.now
    alone = d.dp_shard * d.cp * d.tp == d.ep * d.etp and d.dp_replicate == 1
    key = (
        d.tp, d.cp, d.ep, d.etp, d.pp > 1, alone, run.microbatch, now.seq_len, run.sums_gradients,
        run.node_size, config.activation_checkpoint.mode,
        config.activation_checkpoint.selective_ac_option, config.training.dtype, world_size == 1,
        run.reshards, d.dp_replicate > 1, *_outside_fsdp(run),
    )  # fmt: skip
    traced = {} if traced is None else traced
    if key not in traced:
        traced[key] = trace_run(run, skew)
    traces = traced[key]
    states = {place: closed_state(run, traces, place) for place in run.places()}
    return assemble(run, hardware, traces, states)


def _outside_fsdp(run: PlannedRun) -> tuple[Any, ...]:
    """Return what traces of weights outside of FSDP depend on: whether each rank gets as many
    experts and rows of the vocabulary, which of both are freed, and whose gradients travel in bf16.
    """
    moe_args = getattr(run.model_args, "moe_args", None)
    dense, experts = (groups(run)[name].size for name in ("fsdp", "expert fsdp"))
    whole = moe_args is not None and moe_args.num_experts % (run.degrees.ep * experts) == 0
    both = Elements(1, 1, 0)
    return whole, run.model_args.vocab_size % dense == 0, run.freed(both), run.narrow(both)


def sweep_table(rows: list[Row], most: int = 12) -> str:
    """Return the sweep as text.

    most: rows that fit, and as many that don't.
    """
    names = list(rows[0].layout) if rows else []
    lines = ["Layouts, the fastest that fit first"]
    head = "".join(f"{name:>10}" for name in names)
    lines.append(f"{head}{'GiB':>8}{'tokens/s/GPU':>14}{'MFU':>7}")
    good = [row for row in rows if not row.reason]
    for row in good[:most]:
        lines.append(
            f"{_cells(row)}{row.gib:8.1f}{row.tokens_per_second_per_gpu:14,.0f}{row.mfu:7.1%}"
        )
    if not good:
        lines.append("none fits")
    others = [row for row in rows if row.reason]
    if others:
        lines.append(f"Those that can't run ({len(others)})")
    lines += [f"{_cells(row)}  {row.reason}" for row in others[:most]]
    return "\n".join(lines)


def _cells(row: Row) -> str:
    return "".join(f"{value!s:>10}" for value in row.layout.values())
