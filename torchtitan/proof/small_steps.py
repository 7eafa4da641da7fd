"""The user's steps, small: sequences, batches, phases and the pipeline's stages keep their order.

Where numbers differ over the run (lengths, sequences of a forward pass), the smaller one stays
smaller; a step that accumulates still does; every phase is entered and left.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import lcm

from torchtitan.config import JobConfig, Phase
from torchtitan.config.phases import RunSchedule, StepSettings
from torchtitan.config.schedule_tables import COEFFICIENTS
from torchtitan.distributed.pipeline_plan import V_SHAPED, PipelinePlan
from torchtitan.proof.small_model import raised, up
from torchtitan.proof.worlds import World

LEAST_TOKENS = 16
STEPS = 3
# Steps of this size move weights by a percent, which stands out from rounding.
PEAK_RATE = 2e-3


def in_order(values: Iterable[int], least: int) -> dict[int, int]:
    """Map each value to a small one: the smallest to `least`, the next larger to twice as much."""
    return {value: least * 2**n for n, value in enumerate(sorted(set(values)))}


@dataclass(frozen=True)
class Stages:
    """Layers of the small model and of its pipeline's first and last stage."""

    n_layers: int
    per_stage: int = 0
    first_less: int = 0
    last_less: int = 0
    modules: list[list[str]] | None = None
    count: int = 1


def small_stages(config: JobConfig, n_layers: int, plan: PipelinePlan | None, pp: int) -> Stages:
    """Return the stages of the small pipeline.

    n_layers: of the user's model.
    plan: of the user's run, None without a pipeline.
    pp: degree to start; 1 = no pipeline.
    """
    if plan is None or pp == 1:
        return Stages(min(n_layers, 3))
    p, count = config.parallelism, len(plan.stages) // plan.degree * pp
    layers = [sum(name.startswith("layers.") for name in stage) for stage in plan.stages]
    if p.module_fqns_per_model_part is not None:
        listed = [*plan.stages[: count - 1], plan.stages[-1]]
        modules = _renumbered(listed)
        total = sum(name.startswith("layers.") for part in modules for name in part)
        return Stages(total, modules=modules, count=count)
    per_stage = min(2, max(layers))

    def less(asked: int, left: int) -> int:
        if not asked or not left:
            return per_stage if asked else 0
        return per_stage - 1

    first = less(p.pipeline_parallel_first_stage_less_layers, layers[0])
    last = less(p.pipeline_parallel_last_stage_less_layers, layers[-1])
    return Stages(per_stage * count - first - last, per_stage, first, last, count=count)


def _renumbered(parts: list[tuple[str, ...]]) -> list[list[str]]:
    """Keep at most two layers of each part, numbered anew."""
    number, small = 0, []
    for part in parts:
        layers = [name for name in part if name.startswith("layers.")][:2]
        names = {old: f"layers.{number + n}" for n, old in enumerate(layers)}
        number += len(layers)
        kept = [name for name in part if name in names or not name.startswith("layers.")]
        small.append([names.get(name, name) for name in kept])
    return small


def small_microbatches(plan: PipelinePlan, stages: int, pp: int, sizes: int) -> int:
    """Return the sequences of a rank's smallest forward pass.

    The largest pass reaches the schedule's steady state; smaller ones are legal.

    stages: of the small pipeline.
    pp: its degree.
    sizes: number of different passes, each twice as large as the one before.
    """
    size = min(2, plan.microbatch_size)
    if plan.file is not None:  # its order is for this number
        return plan.num_microbatches * size
    legal = stages if plan.schedule in ("1F1B", *V_SHAPED) else pp
    steady = max(stages, pp + 1)
    return min(plan.num_microbatches, max(legal, -(-steady // 2 ** (sizes - 1)))) * size


@dataclass(frozen=True)
class Steps:
    """Small sizes of the steps.

    lengths: tokens of a sequence, by the user's.
    passes: sequences of a rank's forward pass, by the user's.
    batch_size: sequences of the first step.
    phases: in order.
    steps: until all phases are over.
    rate: factor on every learning rate.
    """

    lengths: dict[int, int]
    passes: dict[int, int]
    batch_size: int
    phases: list[Phase]
    steps: int
    rate: float


def small_steps(
    config: JobConfig, schedule: RunSchedule, whole: World, world: World, least: int, yarn_from: int
) -> Steps:
    """Return the sizes of the steps of `world`, in place of `whole`.

    least: sequences of the smallest forward pass of a rank.
    yarn_from: tokens above which the model scales positions, 0 for none.
    """
    ends, cp, tp = schedule.ends, world.degrees.cp, world.degrees.tp
    unit = lcm(2 * cp if cp > 1 else 1, cp * tp)
    known = {end.seq_len for end in ends} | ({yarn_from} if yarn_from else set())
    lengths = in_order(known, up(LEAST_TOKENS, unit))
    passes = in_order({end.local_batch_size for end in ends}, least)
    peak = max(end.lr for end in ends)
    rate = max(1.0, PEAK_RATE / peak) if peak else 1.0
    sizes = [_small_batch(end, passes, whole, world) for end in ends]
    phases: list[Phase] = []
    nominal = actual = 0  # tokens: by the phases' lengths, and as steps end
    for n, (phase, end) in enumerate(zip(schedule.phases, ends[1:], strict=True)):
        before, after, seq_len = sizes[n], sizes[n + 1], lengths[end.seq_len]
        step = passes[end.local_batch_size] * world.dp_degree
        if phase.batch_size_shape == "linear" and before == after:
            grows = ends[n + 1].batch_size > ends[n].batch_size
            after = before + step if grows else max(step, before - step)
        sizes[n + 1] = after
        stairs = phase.batch_size_shape == "linear" and before != after
        several = stairs or phase.lr_shape != "constant"
        tokens = actual - nominal + (before if stairs else after) * seq_len
        if several:
            tokens *= 2
        phases.append(_small_phase(phase, tokens, lengths, passes, rate, before, after))
        nominal += tokens
        while actual < nominal:
            late = stairs and actual - (nominal - tokens) >= tokens / 2
            actual += (after if late or not stairs else before) * seq_len
    first = StepSettings(
        0, "", 0.0, sizes[0], lengths[ends[0].seq_len], passes[ends[0].local_batch_size]
    )
    steps = max(STEPS, RunSchedule(phases, first).num_steps())
    return Steps(lengths, passes, sizes[0], phases, steps, rate)


def _small_batch(end: StepSettings, passes: dict[int, int], whole: World, world: World) -> int:
    """Return the sequences of a step: one pass, or two where the user's step accumulates."""
    accumulates = end.batch_size > end.local_batch_size * whole.dp_degree
    return passes[end.local_batch_size] * world.dp_degree * (2 if accumulates else 1)


def _small_phase(
    phase: Phase,
    tokens: float,
    lengths: dict[int, int],
    passes: dict[int, int],
    rate: float,
    before: int,
    after: int,
) -> Phase:
    stairs = phase.batch_size_shape == "linear"
    coefficients = {name: raised(name, getattr(phase, name)) for name in COEFFICIENTS}
    return replace(
        phase,
        tokens=float(tokens),
        lr=None if phase.lr is None else phase.lr * rate,
        seq_len=None if phase.seq_len is None else lengths[phase.seq_len],
        local_batch_size=None if phase.local_batch_size is None else passes[phase.local_batch_size],
        batch_size=after if phase.batch_size is not None or after != before else None,
        batch_size_step=(abs(after - before) or after) if stairs else None,
        **coefficients,
    )
