"""Draw the passes of each rank of a pipeline over time, for each schedule.

    python scripts/plot_schedules.py docs/schedules.png        (needs matplotlib)

The order of the passes is that of torch's schedule object; the times are simulated: a forward pass
of a whole rank takes 2 units, as does each half of its backward pass (for inputs, for weights), and
sending takes none. A rank with two stages does each in half the time.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("picture", help="the file to draw into, such as picture.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse)

# isort: split
import matplotlib
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from torchtitan.distributed.pipeline_plan import SCHEDULES, SINGLE

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RANKS, MICROBATCHES = 4, 8
# By the letter of torch's actions: how many forward passes of a stage each takes.
PASSES = {"F": 1, "B": 2, "I": 1, "W": 1}
NAMES = {"F": "forward", "B": "backward", "I": "for inputs", "W": "for weights"}
COLOURS = {"F": "#9dc3e6", "B": "#f4b183", "I": "#ffd27f", "W": "#a9d18e"}


class Pass(NamedTuple):
    """One pass of a stage.

    start, end: in units of the simulated time, common to all ranks.
    """

    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


def order(schedule: str) -> list[list[tuple[str, int, int]]]:
    """List kind, stage and micro-batch of each rank's passes; overlapped pairs in sequence."""
    by_rank = []
    for actions in get_schedule_ops(schedule, RANKS, MICROBATCHES):
        # Their text, "0F3" and "(0F3;7B1)OVERLAP_F_B", is the same in torch 2.11 and 2.13.
        found = re.findall(r"(\d+)([FBIW])(\d+)", " ".join(map(str, actions)))
        # torch 2.13 lists the last rank's forward passes of 1F1B as 1 to 8, and runs 0 to 7.
        off = min(int(number) for _, kind, number in found if kind == "F")
        by_rank.append([(k, int(stage), int(n) - off * (k == "F")) for stage, k, n in found])
    return by_rank


def play(schedule: str) -> list[list[Pass]]:
    """Simulate a schedule: each pass starts when its rank is free and its inputs are computed."""
    waiting = [list(passes) for passes in order(schedule)]
    unit = 2.0 if schedule in SINGLE else 1.0
    last = max(stage for passes in waiting for _, stage, _ in passes)
    done: dict[tuple[str, int, int], float] = {}
    played: list[list[Pass]] = [[] for _ in waiting]
    while any(waiting):
        moved = False
        for passes, before in zip(waiting, played, strict=True):
            while passes:
                kind, stage, microbatch = passes[0]
                ready = _ready(done, kind, stage, microbatch, last)
                if ready is None:
                    break
                start = max(ready, before[-1].end if before else 0.0)
                done[passes.pop(0)] = end = start + unit * PASSES[kind]
                before.append(Pass(kind, stage, microbatch, start, end))
                moved = True
        if not moved:
            raise RuntimeError(f"{schedule} deadlocks: {[p[0] for p in waiting if p]}")
    return played


def _ready(done: dict, kind: str, stage: int, microbatch: int, last: int) -> float | None:
    """Time at which the inputs of a pass are computed; None while that is unknown."""
    if kind == "W":
        return done.get(("I", stage, microbatch))
    if kind == "F":
        return 0.0 if stage == 0 else done.get(("F", stage - 1, microbatch))
    if stage == last:
        return done.get(("F", stage, microbatch))
    return done.get(("B", stage + 1, microbatch), done.get(("I", stage + 1, microbatch)))


def idle(played: list[list[Pass]]) -> float:
    """Share of all ranks' time in which they wait."""
    length = max(passes[-1].end for passes in played)
    busy = sum(one.end - one.start for passes in played for one in passes)
    return 1 - busy / (length * len(played))


def draw(axis: Axes, schedule: str, played: list[list[Pass]]) -> None:
    for rank, passes in enumerate(played):
        for one in passes:
            colour, width = COLOURS[one.kind], one.end - one.start
            second = one.stage >= RANKS  # a rank's second stage: darker edge
            edge = "black" if second else "#8a97a8"
            axis.barh(-rank, width, left=one.start, color=colour, edgecolor=edge, lw=0.5, height=1)
            middle = (one.start + one.end) / 2
            axis.text(middle, -rank, str(one.microbatch), ha="center", va="center", fontsize=5)
    axis.set_title(f"{schedule}: {idle(played):.0%} idle", fontsize=8, loc="left", pad=2)
    axis.set_yticks([-rank for rank in range(RANKS)], [f"rank {r}" for r in range(RANKS)])
    axis.tick_params(labelsize=6, length=0)
    axis.set_xticks([])
    axis.set_facecolor("#f2f4f7")


def main(path: str) -> None:
    played = {schedule: play(schedule) for schedule in SCHEDULES}
    figure, axes = plt.subplots(len(played), 1, figsize=(10, 1.05 * len(played)), sharex=True)
    for axis, (schedule, passes) in zip(axes, played.items(), strict=True):
        draw(axis, schedule, passes)
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in PASSES]
    figure.legend(marks, NAMES.values(), loc="lower center", ncols=len(PASSES), fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1), h_pad=0.3)
    figure.savefig(Path(path), dpi=110)
    for schedule, passes in played.items():
        print(f"{schedule}: {idle(passes):.1%} idle")


if __name__ == "__main__":
    entry.run(main, parse(None).picture)
