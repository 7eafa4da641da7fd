"""Play a pipeline's schedule: when each rank computes, and how long it waits.

The order of the work is that of torch's own schedule object, or of the file; a pass starts as soon
as its rank is free and its inputs have arrived.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from torchtitan.distributed.pipeline_plan import SINGLE, PipelinePlan


class Action(NamedTuple):
    """One pass of a micro-batch through a stage.

    kind: F forward, B backward, I and W its halves for inputs and for weights.
    """

    kind: str
    stage: int
    microbatch: int


class Pass(NamedTuple):
    """An action with its time, in seconds from the start of the schedule."""

    action: Action
    start: float
    end: float


def actions_of(plan: PipelinePlan) -> list[list[Action]]:
    """List each rank's actions in order; an overlapped pair one after the other."""
    if plan.file is not None:
        cells = [[str(cell) for cell in rank] for rank in plan.file.cells]
    else:
        stages = None if plan.schedule in SINGLE else len(plan.stages) // plan.degree
        ops = get_schedule_ops(plan.schedule, plan.degree, plan.num_microbatches, stages)
        cells = [[str(op) for op in rank] for rank in ops]
    by_rank = []
    for rank in cells:
        found = re.findall(r"(\d+)([FBIW])(\d+)", " ".join(rank))
        # torch 2.13 lists the last rank's forward passes of 1F1B as 1 to n, and runs 0 to n - 1.
        off = min(int(number) for _, kind, number in found if kind == "F")
        by_rank.append([Action(k, int(s), int(n) - off * (k == "F")) for s, k, n in found])
    return by_rank


def play(
    by_rank: list[list[Action]], seconds: Callable[[Action], float], sending: float
) -> list[list[Pass]]:
    """Return the times of all passes, by rank.

    by_rank: actions.
    seconds: of an action.
    sending: seconds from a stage to the next one on another rank.
    """
    waiting = [list(actions) for actions in by_rank]
    rank_of = {one.stage: rank for rank, actions in enumerate(by_rank) for one in actions}
    last = max(rank_of)
    done: dict[Action, float] = {}
    played: list[list[Pass]] = [[] for _ in waiting]
    heads = [0] * len(waiting)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(waiting):
            while heads[rank] < len(actions):
                action = actions[heads[rank]]
                ready = _ready(done, action, last, rank_of, sending)
                if ready is None:
                    break
                start = max(ready, played[rank][-1].end if played[rank] else 0.0)
                done[action] = end = start + seconds(action)
                played[rank].append(Pass(action, start, end))
                heads[rank] += 1
                moved = True
    assert all(head == len(actions) for head, actions in zip(heads, waiting, strict=True))
    return played


def _ready(
    done: dict[Action, float], action: Action, last: int, rank_of: dict[int, int], sending: float
) -> float | None:
    """Return when the inputs of an action have arrived; None as long as that isn't known."""
    kind, stage, microbatch = action
    if kind == "W":
        return done.get(Action("I", stage, microbatch))
    if kind == "F":
        if stage == 0:
            return 0.0
        before = (done.get(Action("F", stage - 1, microbatch)), stage - 1)
    elif stage == last:
        return done.get(Action("F", stage, microbatch))
    else:
        behind = done.get(Action("B", stage + 1, microbatch))
        if behind is None:
            behind = done.get(Action("I", stage + 1, microbatch))
        before = (behind, stage + 1)
    when, source = before
    if when is None:
        return None
    return when + (sending if rank_of[source] != rank_of[stage] else 0.0)


def length(played: list[list[Pass]]) -> float:
    return max(passes[-1].end for passes in played)


def idle(played: list[list[Pass]]) -> float:
    """Return the part of all ranks' time in which they wait."""
    busy = sum(one.end - one.start for passes in played for one in passes)
    return 1 - busy / (length(played) * len(played))
