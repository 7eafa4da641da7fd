"""A plan as a table for the terminal, and as data for JSON."""

from typing import Any

import torchtitan
from torchtitan.planning.dispatchers import DISPATCHERS, break_even
from torchtitan.planning.memory import PARTS, RankMemory
from torchtitan.planning.plan import (
    PhasePlan,
    Plan,
    fullest,
    schedule_hours,
    schedule_tokens,
)
from torchtitan.planning.timing import gpu_hours
from torchtitan.planning.traffic import WAYS

GIB = 2**30


def table(plan: Plan, tokens: float | None) -> str:
    """Return the plan as text.

    tokens: of the whole run, for its cost.
    """
    blocks = [head_lines(plan), _memory(plan), _time(plan, tokens), _traffic(plan)]
    if plan.dispatch:
        blocks.append(_dispatch(plan))
    if plan.dispatchers:
        blocks.append(_dispatchers(plan))
    return "\n\n".join("\n".join(block) for block in blocks)


def head_lines(plan: Plan) -> list[str]:
    run, hardware = plan.run, plan.hardware
    degrees = " x ".join(f"{k} {n}" for k, n in run.degrees._asdict().items() if n > 1)
    now = run.now
    lines = [
        f"{run.config.model.name} {run.config.model.flavor} on {run.world_size:,} {hardware.about}",
        f"Layout: {degrees or 'one process'}; {run.node_size} ranks a node",
        f"A step: {now.batch_size:,} sequences of {now.seq_len:,} tokens, {now.local_batch_size} a "
        f"data-parallel rank and pass, {run.passes} pass{'es' if run.passes > 1 else ''}",
    ]
    phases = len(run.config.schedule.phase)
    if phases:
        which = f"the last step of phase {run.phase}" if run.phase else "the run's first step"
        lines.append(f"This is {which}; --phase 0 to {phases} plans another")
    routing = plan.traces.routing
    if routing is not None:
        lines.append(
            f"Routing: the busiest expert has {routing.skew:.2f} times the mean, the busiest EP "
            f"rank {routing.rank_skew:.2f} times"
        )
    return [*lines, f"Planned by torchtitan-moe {torchtitan.__version__}"]


def phase_lines(phases: list[PhasePlan], tokens: float | None) -> list[str]:
    """Return the phases of a schedule, a line each, and those that decide.

    tokens: of the whole run; None = of all phases.
    """
    head = "Phases, at their last step"
    width = max(len(head), *(len(each.title) + 2 for each in phases)) + 2
    lines = [
        f"{head:{width}}{'tokens':>10}{'a step':>18}{'a pass':>8}{'GiB':>8}{'s/step':>10}"
        f"{'tokens/s/GPU':>14}"
    ]
    for each in phases:
        plan, now = each.plan, each.plan.run.now
        of_all = f"{each.tokens:.3g}" if each.tokens else ""
        needed = plan.hardware.needed_gib(plan.worst.peak.total)
        lines.append(
            f"  {each.title:{width - 2}}{of_all:>10}{f'{now.batch_size:,} x {now.seq_len:,}':>18}"
            f"{now.local_batch_size:8}{needed:8.1f}{plan.time.seconds:10.3f}"
            f"{plan.speed.tokens_per_second_per_gpu:14,.0f}"
        )
    longest, total = max(phases, key=lambda each: each.tokens), schedule_tokens(phases)
    lines.append(
        f"Most tokens ({longest.tokens / total:.0%}) are in {longest.title}: "
        f"{longest.plan.time.seconds:.3f} s a step. "
        f"Most memory: {fullest(phases).title}, which follows."
    )
    hours = schedule_hours(phases, tokens)
    lines.append(
        f"{tokens or total:.3g} tokens: {hours:,.0f} GPU-hours, "
        f"{hours / phases[0].plan.run.world_size / 24:,.1f} days"
    )
    return lines


def phase_data(phases: list[PhasePlan], tokens: float | None) -> dict[str, Any]:
    """Return the same for JSON."""
    rows = [
        {
            "phases": each.numbers,
            "tokens": each.tokens,
            "batch_size": each.plan.run.now.batch_size,
            "seq_len": each.plan.run.now.seq_len,
            "needed_gib": each.plan.hardware.needed_gib(each.plan.worst.peak.total),
            "step_seconds": each.plan.time.seconds,
            "tokens_per_second_per_gpu": each.plan.speed.tokens_per_second_per_gpu,
        }
        for each in phases
    ]
    return {"phases": rows, "gpu_hours": schedule_hours(phases, tokens)}


def verdict(plan: Plan) -> str:
    """Say in a sentence whether it fits."""
    needed, has = plan.hardware.needed_gib(plan.worst.peak.total), plan.hardware.memory_gib
    fits = "fits" if plan.fits else "does not fit"
    return (
        f"It {fits}: the fullest rank needs {needed:.1f} of {has:g} GiB, most in the "
        f"{plan.worst.peak.what}."
    )


def _memory(plan: Plan) -> list[str]:
    lines = ["Memory of a rank at its peak, GiB"]
    names = [where(plan, rank) for rank in plan.memory]
    width = max(18, *(len(name) + 2 for name in names))
    lines.append(" " * 20 + "".join(f"{name:>{width}}" for name in names))
    for part in PARTS:
        cells = [rank.peak.parts[part] / GIB for rank in plan.memory]
        lines.append(f"{part:20}" + "".join(f"{cell:{width}.2f}" for cell in cells))
    totals = [rank.peak.total / GIB for rank in plan.memory]
    lines.append(f"{'all tensors':20}" + "".join(f"{cell:{width}.2f}" for cell in totals))
    needed = [plan.hardware.needed_gib(rank.peak.total) for rank in plan.memory]
    lines.append(f"{'of the device':20}" + "".join(f"{cell:{width}.2f}" for cell in needed))
    if plan.run.pipeline:
        held = [rank.most_in_flight for rank in plan.memory]
        lines.append(f"{'micro-batches held':20}" + "".join(f"{cell:{width}}" for cell in held))
    lines.append(verdict(plan))
    return lines


def where(plan: Plan, rank: RankMemory) -> str:
    if plan.run.pipeline is None:
        return "every rank"
    last = rank.rank + rank.alike - 1
    return f"ranks {rank.rank}-{last}" + (f" +{rank.others}" if rank.others else "")


def _time(plan: Plan, tokens: float | None) -> list[str]:
    time, speed = plan.time, plan.speed
    lines = [f"Time of a step: {time.seconds:.3f} s"]
    for name, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        if seconds > 0:
            lines.append(f"  {name:22}{seconds:9.3f} s {seconds / time.seconds:6.1%}")
    lines.append(
        f"{speed.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, "
        f"{speed.tflops_per_gpu:.0f} TFLOP/s/GPU, {speed.mfu:.1%} MFU "
        f"(of {plan.hardware.bf16_tflops:g}, bf16)"
    )
    if tokens:
        lines.append(
            f"{tokens:.3g} tokens: {gpu_hours(tokens, speed):,.0f} GPU-hours, "
            f"{tokens / speed.tokens_per_second / 86400:,.1f} days"
        )
    return lines


def _traffic(plan: Plan) -> list[str]:
    if plan.run.world_size == 1:
        return ["Nothing is sent: one process"]
    place = max(plan.traffic, key=lambda p: sum(b.between for b in plan.traffic[p].values()))
    lines = ["Sent by a rank in a step, GiB    inside the node   between nodes"]
    for axis, sent in plan.traffic[place].items():
        lines.append(f"  {axis:28}{sent.inside / GIB:18.2f}{sent.between / GIB:16.2f}")
    return lines


def _dispatch(plan: Plan) -> list[str]:
    lines = [
        "Experts' exchange of a layer and micro-batch, MiB a rank: inside the node, between nodes"
    ]
    limits = sorted({limit for _, limit in plan.dispatch})
    lines.append(f"  {'one copy of a token for each':30}" + "".join(f"{x:>24}" for x in limits))
    for way in WAYS:
        cells = [plan.dispatch[way, limit] for limit in limits]
        texts = [f"{c.inside / 2**20:,.1f}, {c.between / 2**20:,.1f}" for c in cells]
        lines.append(f"  {way:30}" + "".join(f"{text:>24}" for text in texts))
    return lines


def _dispatchers(plan: Plan) -> list[str]:
    lines = ["Dispatchers by network: exchange of a layer and micro-batch, whole step"]
    lines.append(f"  {'Gbit/s a GPU':14}" + "".join(f"{name:>24}" for name in DISPATCHERS))
    for gbits in dict.fromkeys(one.gbits for one in plan.dispatchers):
        found = [one for one in plan.dispatchers if one.gbits == gbits]
        texts = [f"{one.exchange_seconds * 1e3:.1f} ms, {one.step_seconds:.3f} s" for one in found]
        lines.append(f"  {gbits:<14g}" + "".join(f"{text:>24}" for text in texts))
    assert plan.traces.routing is not None
    equal = break_even(plan.run, plan.traces.routing, plan.hardware)
    return [*lines, f"node_limited's exchange takes less time below {equal:,.0f} Gbit/s a GPU"]


def as_data(plan: Plan, tokens: float | None) -> dict[str, Any]:
    """Return all numbers of the table, for JSON, in bytes and seconds."""
    run, speed = plan.run, plan.speed
    return {
        "version": torchtitan.__version__,
        "model": f"{run.config.model.name} {run.config.model.flavor}",
        "hardware": plan.hardware.name,
        "world_size": run.world_size,
        "degrees": run.degrees._asdict(),
        "batch_size": run.now.batch_size,
        "seq_len": run.now.seq_len,
        "fits": plan.fits,
        "memory": [
            {
                "rank": rank.rank,
                "like_it": rank.alike,
                "peak": rank.peak.total,
                "when": rank.peak.what,
                "needed_gib": plan.hardware.needed_gib(rank.peak.total),
                "parts": rank.peak.parts,
                "micro_batches_held": rank.most_in_flight,
                "state": vars(rank.state),
            }
            for rank in plan.memory
        ],
        "step_seconds": plan.time.seconds,
        "seconds": plan.time.parts,
        "tokens_per_second_per_gpu": speed.tokens_per_second_per_gpu,
        "tflops_per_gpu": speed.tflops_per_gpu,
        "mfu": speed.mfu,
        "gpu_hours": gpu_hours(tokens, speed) if tokens else None,
        "traffic": {
            place * run.stage_size: {axis: vars(sent) for axis, sent in by_axis.items()}
            for place, by_axis in plan.traffic.items()
        },
        "dispatch": [
            {"one_copy_for_each": way, "limit": limit, **vars(sent)}
            for (way, limit), sent in plan.dispatch.items()
        ],
        "dispatchers": [vars(one) for one in plan.dispatchers],
        "routing_skew": plan.traces.routing.skew if plan.traces.routing else None,
    }
