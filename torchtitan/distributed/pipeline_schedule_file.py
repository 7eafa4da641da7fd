"""A custom pipeline schedule from a file: the passes that each rank runs, in order.

The form is that of torch's `_dump_csv(format="compute_only")`: a line for each rank, its passes
separated by commas; empty cells are ignored. `2F0` is the forward pass of stage 2 over micro-batch
0; `B` a whole backward pass, or `I` and later `W` its halves, for the inputs and for the weights.
`(0F3;7B1)OVERLAP_F_B` is a pair that may overlap.

All of it is checked here: torch would notice some faults when training starts, and hang on others.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torchtitan.tools.errors import UserError
from torchtitan.tools.near_path import near_path

KEY = "parallelism.pipeline_parallel_schedule_csv"
_PASS = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((\d+F\d+);(\d+[BI]\d+)\)OVERLAP_F_B")


class Pass(NamedTuple):
    """One pass of a stage over a micro-batch.

    kind: F, B, I or W.
    """

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class ScheduleFile:
    """A parsed schedule.

    cells: texts of each rank, without the empty ones.
    passes: the passes of each cell; a pair is one entry of two passes.
    """

    path: str
    cells: tuple[tuple[str, ...], ...]
    passes: tuple[tuple[tuple[Pass, ...], ...], ...]

    def of_rank(self, rank: int) -> list[Pass]:
        return [one for entry in self.passes[rank] for one in entry]

    @property
    def all_passes(self) -> list[Pass]:
        return [one for rank in range(len(self.passes)) for one in self.of_rank(rank)]

    @property
    def num_stages(self) -> int:
        return 1 + max(one.stage for one in self.all_passes)

    @property
    def rank_of_stage(self) -> tuple[int, ...]:
        ranks = {one.stage: r for r in range(len(self.passes)) for one in self.of_rank(r)}
        return tuple(ranks[stage] for stage in range(self.num_stages))

    @property
    def splits_backward(self) -> bool:
        return any(one.kind in "IW" for one in self.all_passes)


def read_schedule_file(
    path: str, *, degree: int, num_microbatches: int, batch_key: str = "training.local_batch_size"
) -> ScheduleFile:
    """Read and check a schedule. Raises `UserError` where the file can't be read, or could not run
    on `degree` ranks with `num_microbatches`.

    batch_key: key that messages name as the source of `num_microbatches`.
    """
    rows = _read(path)
    if len(rows) != degree:
        raise UserError(
            f"{KEY} {path} has {len(rows)} lines, but it needs one for each rank of "
            f"parallelism.pipeline_parallel_degree ({degree})."
        )
    passes = tuple(tuple(_parse(cell, path, rank) for cell in row) for rank, row in enumerate(rows))
    file = ScheduleFile(path, rows, passes)
    _check_microbatches(file, num_microbatches, batch_key)
    _check_complete(file, num_microbatches)
    _check_order(file)
    return file


def _read(path: str) -> tuple[tuple[str, ...], ...]:
    try:
        with Path(path).open(newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except OSError as error:
        raise UserError(
            f"{KEY} {path} can't be read ({error.strerror}); "
            f"{near_path(path, 'name a readable file.')}"
        ) from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(
            f"{KEY} {path} is not a file of comma-separated values; name one, or leave it out."
        ) from None
    rows = [tuple(cell for cell in row if cell) for row in rows]
    return tuple(row for row in rows if row)


def _parse(cell: str, path: str, rank: int) -> tuple[Pass, ...]:
    pair = _PAIR.fullmatch(cell)
    if pair is None and cell.endswith("OVERLAP_F_B"):
        raise UserError(
            f"{KEY} {path}: rank {rank} has '{cell}', but a pair is a forward pass, then B or I of "
            "another micro-batch, such as '(0F3;7B1)OVERLAP_F_B'."
        )
    passes = []
    for text in pair.groups() if pair else (cell,):
        found = _PASS.fullmatch(text)
        if not found:
            raise UserError(
                f"{KEY} {path}: rank {rank} has '{cell}', which is not a pass; write the stage, F, "
                "B, I or W, and the micro-batch, such as '0F0'."
            )
        passes.append(Pass(int(found[1]), found[2], int(found[3])))
    return tuple(passes)


def _check_microbatches(file: ScheduleFile, expected: int, batch_key: str) -> None:
    number = 1 + max(one.microbatch for one in file.all_passes)
    if number != expected:
        raise UserError(
            f"{KEY} {file.path} is for {number} micro-batches, but {batch_key} over "
            f"parallelism.pipeline_parallel_microbatch_size makes {expected}; change either."
        )


def _check_complete(file: ScheduleFile, num_microbatches: int) -> None:
    """Check that each stage is on one rank and takes each micro-batch forward and backward once."""
    rank_of: dict[int, int] = {}
    for rank in range(len(file.passes)):
        for one in file.of_rank(rank):
            if rank_of.setdefault(one.stage, rank) != rank:
                raise UserError(
                    f"{KEY} {file.path} has passes of stage {one.stage} on rank "
                    f"{rank_of[one.stage]} and on rank {rank}; a stage must be on one rank."
                )
    counts = Counter(file.all_passes)
    for stage in range(file.num_stages):
        for microbatch in range(num_microbatches):
            forward, *backward = (counts[Pass(stage, kind, microbatch)] for kind in "FBIW")
            if forward != 1 or backward not in ([1, 0, 0], [0, 1, 1]):
                whole, inputs, weights = backward
                raise UserError(
                    f"{KEY} {file.path} must have '{stage}F{microbatch}' once, and either "
                    f"'{stage}B{microbatch}' once or '{stage}I{microbatch}' and "
                    f"'{stage}W{microbatch}' once each; it has {forward}, and {whole} or {inputs} "
                    f"and {weights}."
                )


def _check_order(file: ScheduleFile) -> None:
    """Simulate the schedule; report each deadlocked rank and the pass at which it waits."""
    done: set[Pass] = set()
    at = [0] * len(file.passes)
    moved = True
    while moved:
        moved = False
        for rank, entries in enumerate(file.passes):
            while at[rank] < len(entries) and all(
                _is_ready(one, done, file.num_stages) for one in entries[at[rank]]
            ):
                done.update(entries[at[rank]])
                at[rank] += 1
                moved = True
    stuck = [
        f"rank {rank} at '{cells[i]}'"
        for rank, (cells, i) in enumerate(zip(file.cells, at, strict=True))
        if i < len(cells)
    ]
    if stuck:
        raise UserError(
            f"{KEY} {file.path} would deadlock, with {' and '.join(stuck)}: F needs F of the "
            "stage before it, B and I need F, and B or I of the stage after it, W needs I."
        )


def _is_ready(one: Pass, done: set[Pass], num_stages: int) -> bool:
    stage, kind, microbatch = one
    if kind == "W":
        return Pass(stage, "I", microbatch) in done
    if kind == "F":
        return stage == 0 or Pass(stage - 1, "F", microbatch) in done
    behind = [Pass(stage + 1, half, microbatch) in done for half in "BI"]
    return Pass(stage, "F", microbatch) in done and (stage == num_stages - 1 or any(behind))
