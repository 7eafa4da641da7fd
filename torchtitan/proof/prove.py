"""Prove a world: train it against one process, and resume it in three ways."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torchtitan.config import JobConfig
from torchtitan.proof.compare import Difference
from torchtitan.proof.plan import Run
from torchtitan.proof.ranks import (
    RankResult,
    checkpoint_of,
    in_folder,
    resume_and_compare,
    resume_exactly,
    train_and_compare,
    train_reference,
)
from torchtitan.proof.record import Key
from torchtitan.tools.errors import RunError
from torchtitan.tools.progress_bar import track

# Checks of a world.
AGAINST, RESUMED = "against one process", "resumed in the same layout"
FROM_ONE = "resumed from one process's checkpoint"
ON_ONE = "its checkpoint resumed on one process"
CHECKS = (AGAINST, RESUMED, FROM_ONE, ON_ONE)
# A token whose two best experts tie within rounding may go to either, and all after it differs: a
# difference counts where it shows with both seeds.
SEEDS = (7, 11)


class Ranks(Protocol):
    """Processes that run a function: `Processes`, or a pool of the tests."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]: ...


# Starts a number of processes for as long as the context lasts; the path is for their logs.
Start = Callable[[int, Path], AbstractContextManager[Ranks]]


@dataclass
class Check:
    """Result of one check of a world.

    compared: number of tensors, over all ranks.
    difference: the first one, None where all is the same.
    worst: largest error of each kind.
    failure: sentence where a rank has failed.
    """

    name: str
    compared: int = 0
    difference: Difference | None = None
    worst: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.difference is None and self.failure is None


def prove(
    run: Run, start: Start, folder: Path, seeds: tuple[int, ...] = SEEDS
) -> tuple[list[Check], int]:
    """Return the checks of one world, up to the first that fails, and the number of seeds used."""
    checks: list[Check] = []
    for n, seed in enumerate(seeds, start=1):
        checking = _checks(run, start, folder / f"seed-{seed}", seed)
        found = list(track(checking, len(CHECKS), f"proving {run.world.size} ranks", "check"))
        checks = checks or found
        if all(check.passed for check in found):
            return found, n
        if any(check.failure for check in found):
            break
    return checks, 1


def _checks(run: Run, start: Start, folder: Path, seed: int) -> Iterator[Check]:
    """Yield checks up to the first that fails: a resume from a wrong run says nothing more."""
    with start(1, folder / "logs-one") as one, start(run.world.size, folder / "logs") as ranks:
        for check in _all_checks(run, one, ranks, folder, seed):
            yield check
            if not check.passed:
                return


def _all_checks(run: Run, one: Ranks, ranks: Ranks, folder: Path, seed: int) -> Iterator[Check]:
    alone, small = _seeded(run.alone, seed), _seeded(run.small, seed)
    reference = folder / "one"
    straight, layout = in_folder(alone, reference), in_folder(small, folder / "layout")
    from_one = in_folder(small, folder / "from-one", checkpoint_of(straight))
    on_one = in_folder(alone, folder / "on-one", checkpoint_of(layout))
    name = AGAINST
    try:
        (expected,) = one.run(train_reference, straight)
        yield _check(name, ranks.run(train_and_compare, layout, reference), expected)
        name = RESUMED
        yield _check(name, ranks.run(resume_exactly, layout))
        name = FROM_ONE
        yield _check(name, ranks.run(resume_and_compare, from_one, reference))
        name = ON_ONE
        yield _check(name, one.run(resume_and_compare, on_one, reference))
    except RunError as error:
        yield Check(name, failure=str(error))


def _seeded(config: JobConfig, seed: int) -> JobConfig:
    return replace(config, debug=replace(config.debug, seed=seed))


def _check(name: str, results: list[RankResult], expected: list[Key] | None = None) -> Check:
    """Merge the ranks' results.

    expected: keys that some rank must have compared.
    """
    order: dict[Key, None] = {}
    for each in results:
        order |= dict.fromkeys(each.keys)
    compared = len(order)
    missing = [key for key in expected or [] if key not in order]
    if expected is not None:
        order = dict.fromkeys([*expected, *order])
    place = {key: n for n, key in enumerate(order)}
    all_differences = [difference for each in results for difference in each.differences]
    all_differences += [Difference(key, float("inf"), 0.0) for key in missing]
    # Of a tensor in pieces, the worst.
    first = min(all_differences, key=lambda d: (place[d.key], -d.error), default=None)
    worst: dict[str, float] = {}
    for each in results:
        for kind, error in each.worst.items():
            worst[kind] = max(worst.get(kind, 0.0), error)
    return Check(name, compared, first, worst)
