"""A plan as one self-contained HTML page."""

from collections.abc import Iterable, Sequence
from html import escape

from torchtitan.planning import svg
from torchtitan.planning.plan import Plan
from torchtitan.planning.report import head_lines, table, verdict, where
from torchtitan.planning.sweep import Row

GIB = 2**30
# As many micro-batches show a schedule's pattern.
_MICRO_BATCHES = 48
_ROWS = 16

_STYLE = """
:root { color-scheme: light dark;
  --text: #1c2430; --page: #f6f7f9; --card: #ffffff; --line: #d5dae1;
  --c0: #3f6fb5; --c1: #d9822b; --c2: #5a9e6f; --c3: #b5475a; --c4: #8b6bb8; --c5: #3b9aa6;
  --c6: #c2a83e; --c7: #7d8794; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --page: #14181e; --card: #1d232b;
  --line: #39424e; --c0: #6f9fe0; --c1: #eaa35c; --c2: #7fc294; --c3: #dc7788; --c4: #ae92d8;
  --c5: #67bcc7; --c6: #dcc66a; --c7: #9aa5b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 16px; background: var(--page);
  color: var(--text); font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .5rem; } h2 { font-size: 1rem; margin: 0 0 .6rem; }
p { margin: .2rem 0; } .verdict { font-weight: 600; margin: .8rem 0; }
main { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  min-width: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--text); font: 11px system-ui, sans-serif; }
.limit { stroke: var(--text); stroke-width: 1; stroke-dasharray: 3 3; } .wait { fill: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; padding: 0;
  margin: .6rem 0 0; font-size: .85rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; }
.note { font-size: .85rem; margin-top: .6rem; }
pre { overflow-x: auto; font-size: .8rem; margin: 0; }
.wide { grid-column: 1 / -1; }
"""
_COLOURS = "".join(
    f".c{i} {{ fill: var(--c{i}); }} .b{i} {{ background: var(--c{i}); }}\n" for i in range(8)
)


def page(plan: Plan, rows: list[Row], tokens: float | None, phases: Sequence[str] = ()) -> str:
    """Return the page.

    rows: of a sweep, empty without one.
    tokens: of the whole run, for its cost.
    phases: lines of a schedule's table.
    """
    title, *lines = head_lines(plan)
    sections = [_text("Phases", "\n".join(phases))] if phases else []
    sections += [_memory(plan), _time(plan), _timeline(plan), _traffic(plan), _dispatch(plan)]
    sections += [_sweep(rows), _text("All numbers", table(plan, tokens))]
    head = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Plan: {escape(title)}</title><style>{_STYLE}{_COLOURS}</style></head><body>"
        f'<h1>{escape(title)}</h1>{head}<p class="verdict">{escape(verdict(plan))}</p>'
        f"<main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, inside: str, note: str = "", *, wide: bool = False) -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{inside}{below}</section>\n"


def _memory(plan: Plan) -> str:
    rows = {
        where(plan, rank): {part: size / GIB for part, size in rank.peak.parts.items() if size}
        | {"outside of tensors": plan.hardware.needed_gib(rank.peak.total) - rank.peak.total / GIB}
        for rank in _some(plan.memory)
    }
    note = f"At each rank's peak; the dashed line is the device's {plan.hardware.memory_gib:g} GiB."
    picture = svg.bars(rows, "GiB", limit=plan.hardware.memory_gib)
    return _section("Memory by part and rank", picture, note)


def _some(memory: list) -> Iterable:
    return sorted(memory, key=lambda rank: -rank.peak.total)[:_ROWS]


def _time(plan: Plan) -> str:
    parts = sorted(plan.time.parts.items(), key=lambda item: -item[1])
    rows = {name: {"seconds": seconds} for name, seconds in parts if seconds > 0}
    speed = plan.speed
    note = (
        f"{plan.time.seconds:.3f} s a step: {speed.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, "
        f"{speed.mfu:.1%} MFU."
    )
    return _section("Where the time of a step goes", svg.bars(rows, "s", digits=3), note)


def _timeline(plan: Plan) -> str:
    played = plan.time.timeline
    if not played or plan.run.pipeline is None:
        return ""
    shown = min(_MICRO_BATCHES, plan.run.pipeline.num_microbatches)
    note = (
        f"{plan.run.pipeline.schedule}, a line for each rank of the pipeline, from the left to the "
        f"right: {shown} of {plan.run.pipeline.num_microbatches} micro-batches."
    )
    return _section("Pipeline", svg.timeline(played, shown), note, wide=True)


def _traffic(plan: Plan) -> str:
    if plan.run.world_size == 1:
        return ""
    place = max(plan.traffic, key=lambda p: sum(b.between for b in plan.traffic[p].values()))
    rows = {
        axis: {"inside the node": sent.inside / GIB, "between nodes": sent.between / GIB}
        for axis, sent in plan.traffic[place].items()
    }
    note = f"Sent by rank {place * plan.run.stage_size} in a step."
    return _section("Bytes by axis and link", svg.bars(rows, "GiB", digits=2), note)


def _dispatch(plan: Plan) -> str:
    rows = {
        f"one copy for each {way}, {limit}": {
            "inside the node": sent.inside / 2**20,
            "between nodes": sent.between / 2**20,
        }
        for (way, limit), sent in plan.dispatch.items()
    }
    if not rows:
        return ""
    note = "Of one layer and micro-batch, out and back, forward and backward, a rank."
    return _section("Experts' exchange", svg.bars(rows, "MiB"), note)


def _sweep(rows: list[Row]) -> str:
    good = [row for row in rows if not row.reason][:_ROWS]
    if not rows:
        return ""
    bars = {_layout(row): {"speed": row.tokens_per_second_per_gpu} for row in good}
    picture = svg.bars(bars, "tokens/s/GPU", digits=0) if bars else "<p>None fits.</p>"
    others = "".join(
        f"<li>{escape(_layout(row))}: {escape(row.reason)}</li>" for row in rows if row.reason
    )
    told = f"<details><summary>Those that can't run</summary><ul>{others}</ul></details>"
    return _section("Layouts that fit, by speed", picture + (told if others else ""))


def _layout(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.layout.items())


def _text(title: str, text: str) -> str:
    return _section(title, f"<pre>{escape(text)}</pre>", wide=True)
