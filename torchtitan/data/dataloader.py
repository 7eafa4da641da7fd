"""Batches of one data-parallel rank, cut from one global order of examples; and the position in it.

The examples of a run are numbered n = 0, 1, 2, ...; example n is the next one of lane n modulo L,
and a lane is a stream of its own. So what is example n depends on the data alone. With N examples
behind it, a run of d data-parallel ranks gives example N + m * d + r to rank r, m = 0, 1, 2, ...:
after k examples on each rank, exactly the next k * d are used. Whatever the number of ranks, loader
workers or accumulation steps, an optimizer step of G sequences sees the same G, and another layout
goes on where the last one stopped.

A loader process makes the whole of each lane that its examples meet. Where L is a multiple of d
(with w workers and local batches of b: of d * w * b), no other process meets it; otherwise several
read and tokenise the same lanes and each drops what is another's, which costs time and no more.
"""

import atexit
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, get_worker_info

from torchtitan.data.identity import START_ANEW, refuse_other_data
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.logging import init_logger, logger

# In the dictionary of an example, for the loader, which takes them out again: how many documents
# were passed over to make it, of a blend the name of its dataset, and (JSON) the position of its
# lane behind it.
SKIPPED = "skipped_documents"
DATASET = "dataset"
POSITION = "position"


@dataclass(frozen=True)
class Share:
    """Which examples a data-parallel rank takes, and which of them each of its workers makes.

    Local batch i holds the rank's examples m in [i * batch_size, (i + 1) * batch_size); worker k
    of w makes the batches k, k + w, k + 2w, ... (torch hands them out by turns).
    """

    dp_rank: int = 0
    dp_degree: int = 1
    batch_size: int = 1
    num_workers: int = 0

    @property
    def processes(self) -> int:
        """That make examples, over all ranks."""
        return self.dp_degree * max(1, self.num_workers)

    def examples(self, first: int, worker: int = 0) -> Iterator[int]:
        """The numbers of this loader process's examples, without end; `first` is N."""
        for batch in itertools.count(worker, max(1, self.num_workers)):
            for m in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                yield first + m * self.dp_degree + self.dp_rank

    def examples_here(self, first: int) -> Iterator[int]:
        """`examples` of the process that calls, which may be a worker."""
        info = get_worker_info()
        return self.examples(first, info.id if info else 0)

    def lanes(self, num_lanes: int, examples: Iterator[int]) -> set[int]:
        """The lanes that these examples meet: after num_lanes batches they meet the same again."""
        return {n % num_lanes for n in itertools.islice(examples, num_lanes * self.batch_size)}

    def times_made(self, num_lanes: int) -> float:
        """How often an example is made on average: each process makes all of the lanes it meets."""
        met = self.lanes(num_lanes, self.examples(0))
        return len(met) * self.processes / num_lanes


class LanesDataset(Protocol):
    """An IterableDataset that yields the examples of `share.examples_here`, with POSITION."""

    share: Share
    num_lanes: int
    infinite: bool
    names: tuple[str, ...]  # of the datasets of a blend; of another, none

    def identity(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        ...

    def start(self, consumed: int, lanes: dict[int, dict]) -> None:
        """The next `iter()` begins behind `consumed` examples; a lane not named at its start."""
        ...

    def resize(self, share: Share, seq_len: int) -> None:
        """The next `iter()` gives examples of `seq_len` tokens, those of `share`."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class ParallelAwareDataLoader:
    """Iterates over the batches of one data-parallel rank.

    The position of the run is what all ranks know together: `merge_states` of every rank's
    `local_state()` is stored once, and `load_state_dict` takes it in any layout. It is the position
    behind the last batch handed out, however many the workers have prepared beyond it. It is made
    of what JSON can hold, so loading it never runs anything.

    Summed over the ranks, `skipped_documents` is how many unusable documents lie before it, and
    `tokens_of[name]` how many tokens that dataset of a blend has given.
    """

    def __init__(self, dataset: LanesDataset) -> None:
        self._dataset = dataset
        self._first = 0  # N: the examples of the run before the current iteration
        self._batches = 0  # of this iteration that were handed out
        self._lanes: dict[int, str] = {}
        self.skipped_documents = 0
        self.tokens_of = dict.fromkeys(dataset.names, 0)
        self._loader = self._make_loader()

    @property
    def _share(self) -> Share:
        return self._dataset.share

    def identity(self) -> dict[str, Any]:
        """What the examples depend on: the data, and how it is cut."""
        return self._dataset.identity()

    def _make_loader(self) -> DataLoader:
        share = self._share
        dataset: Any = self._dataset  # torch wants a class of its own, and needs the methods only
        return DataLoader(
            dataset,
            batch_size=share.batch_size,
            num_workers=share.num_workers,
            multiprocessing_context=_worker_context(dataset) if share.num_workers else None,
            worker_init_fn=_start_worker,
            # torch draws a seed for the workers: from here, so that the run's own random
            # numbers are the same however often an iteration starts.
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[Any]:
        """From the loaded position, once; and otherwise from the beginning of the data."""
        if self._batches:
            self._start(0, {}, 0, {})
        return self._iterate()

    def resize(self, state: dict[str, Any], *, batch_size: int, seq_len: int) -> None:
        """Other batches from here on, also from the iterator in use. state: merged, of now."""
        self._dataset.resize(replace(self._share, batch_size=batch_size), seq_len)
        self._loader = self._make_loader()
        self.load_state_dict(state)

    def _iterate(self) -> Iterator[Any]:
        loader = None
        while loader is not self._loader:  # at first, and after `resize`
            loader = self._loader
            for batch in self._batches_of(loader):
                yield batch
                if loader is not self._loader:
                    break

    def _batches_of(self, loader: DataLoader) -> Iterator[Any]:
        examples = itertools.count(self._first + self._share.dp_rank, self._share.dp_degree)
        try:
            for batch in loader:
                self._batches += 1
                self.skipped_documents += int(batch[0].pop(SKIPPED).sum())
                for name in batch[0].pop(DATASET, ()):
                    self.tokens_of[name] += batch[1][0].numel()
                for position, n in zip(batch[0].pop(POSITION), examples, strict=False):
                    self._lanes[n % self._dataset.num_lanes] = position
                yield batch
        except (UserError, RunError) as error:
            # From a worker it comes wrapped in that worker's traceback; the sentence is the end.
            kind = type(error)
            sentence = str(error).rpartition(f"{kind.__name__}: ")[2]
            # The traceback's line break, which `UserError` has escaped.
            raise kind(sentence.strip().removesuffix("\\n")) from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise RunError(
                f"a process of training.dataset_num_workers = {self._share.num_workers} that reads "
                f"the data has ended ({' '.join(str(error).split())}), perhaps for want of memory; "
                "set fewer and start the run again: it goes on from its newest checkpoint."
            ) from None

    def local_state(self) -> dict[str, Any]:
        """What this rank knows of the position, for `merge_states`."""
        assert self._dataset.infinite, "a single pass through the data has no position to resume"
        taken = self._batches * self._share.batch_size
        return {
            "dp_rank": self._share.dp_rank,
            "consumed": self._first + taken * self._share.dp_degree,
            "lanes": {str(lane): json.loads(text) for lane, text in self._lanes.items()},
            # One rank tells for all: with many files it is long.
            "identity": self._dataset.identity() if self._share.dp_rank == 0 else {},
            "skipped_documents": self.skipped_documents,
            "tokens_of": dict(self.tokens_of),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a merged state. Raises `UserError` where it is damaged or of other data."""
        if not state:
            logger.warning(
                "The checkpoint has no data position: the data starts from its beginning"
            )
            return
        try:
            refuse_other_data(state["identity"], self._dataset.identity())
            lanes = {int(lane): position for lane, position in state["lanes"].items()}
            _check_complete(state["consumed"], lanes, self._dataset.num_lanes)
            skipped, tokens_of = int(state["skipped_documents"]), state.get("tokens_of", {})
            self._start(int(state["consumed"]), lanes, skipped, tokens_of)
        except UserError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"The checkpoint's data position is damaged ({type(error).__name__}: {error}); "
                f"take another checkpoint, {START_ANEW}."
            ) from None

    def _start(
        self, consumed: int, lanes: dict[int, dict], skipped: int, tokens_of: dict[str, int]
    ) -> None:
        self._dataset.start(consumed, lanes)
        self._first, self._batches = consumed, 0
        # What all ranks have in common, one of them tells.
        tells = self._share.dp_rank == 0
        self._lanes = {lane: json.dumps(p) for lane, p in lanes.items()} if tells else {}
        self.skipped_documents = skipped if tells else 0
        known = tokens_of if tells else {}
        self.tokens_of = {name: int(known.get(name, 0)) for name in self._dataset.names}


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The position of the run from the `local_state()` of all ranks, in any order.

    Ranks that share their data (tensor parallelism) may all be there. Where a lane is shared, the
    rank that took its last example knows best.
    """
    ranks = {state["dp_rank"]: state for state in states}
    consumed = {state["consumed"] for state in ranks.values()}
    assert len(consumed) == 1, f"the ranks have taken different numbers of batches: {consumed}"
    lanes: dict[str, dict] = {}
    for state in ranks.values():
        for lane, position in state["lanes"].items():
            if lane not in lanes or position["taken"] > lanes[lane]["taken"]:
                lanes[lane] = position
    return {
        "consumed": consumed.pop(),
        "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0]))),
        "identity": ranks[0]["identity"],
        "skipped_documents": sum(state["skipped_documents"] for state in ranks.values()),
        "tokens_of": {
            name: sum(state["tokens_of"][name] for state in ranks.values())
            for name in states[0]["tokens_of"]
        },
    }


def build_dataloader(dataset: LanesDataset) -> ParallelAwareDataLoader:
    """A loader over the examples of the dataset's share."""
    share = dataset.share
    for name, value, least in (
        ("batch_size", share.batch_size, 1),
        ("num_workers", share.num_workers, 0),
    ):
        if value < least:
            raise UserError(f"The data loader's {name} = {value} must be at least {least}.")
    assert 0 <= share.dp_rank < share.dp_degree, share
    return ParallelAwareDataLoader(dataset)


def _check_complete(consumed: int, lanes: dict[int, dict], num_lanes: int) -> None:
    """Of the examples below `consumed`, each lane has given those with its number."""
    if consumed < 0 or lanes.keys() - range(num_lanes):
        raise ValueError(f"{consumed} examples of lanes {sorted(lanes)}")
    for lane in range(num_lanes):
        due = len(range(lane, consumed, num_lanes))
        taken = lanes[lane]["taken"] if lane in lanes else 0
        if taken != due:
            raise ValueError(f"lane {lane} has given {taken} of {due} examples")


def _worker_context(dataset: LanesDataset) -> BaseContext:
    """Workers come from a clean server process, not as forks of the trainer: a fork copies the
    locks of CUDA's, NCCL's and gloo's threads without the threads, and may wait for them forever.

    A run's signals are blocked in its children (`SignalListener`), SIGTERM among them, with which
    multiprocessing ends what is left of them at exit, to wait for them then: they are killed first.
    """
    atexit.register(_kill_workers)
    context = multiprocessing.get_context("forkserver")
    # Imported once in the server instead of once in each worker.
    context.set_forkserver_preload([__name__, type(dataset).__module__])
    return context


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _start_worker(worker: int) -> None:
    init_logger()  # a fresh process has no log handlers
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    """torch's own watch looks whether the worker's parent lives, and that is the server, which
    in turn lives as long as any worker: after a kill of the trainer both would stay for ever."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "called outside of a worker"
    trainer.join()
    os._exit(1)
