"""Batches of one data-parallel rank, cut from one global order of examples; and the position in it.

The examples of a run are numbered n = 0, 1, 2, ...; example n is the next one of stream n modulo S,
and each of the S streams is a sequence of documents of its own. So what is example n depends on the
data alone. With N examples behind it, a run of d data-parallel ranks gives example N + m * d + r to
rank r, m = 0, 1, 2, ...: after k examples on each rank, exactly the next k * d are used. Whatever
the number of ranks, loader workers or accumulation steps, an optimizer step of G sequences sees the
same G, and another layout resumes where the last one stopped.

A loader process makes the whole of each stream that its examples come from. Where S is a multiple
of d (with w workers and local batches of b: of d * w * b), no other process takes from it;
otherwise several read and tokenise the same streams and each drops what is another's, which costs
time and no more.

`torchdata`'s StatefulDataLoader runs the workers and brings their state with each batch
(worker_processes.py). The order, and one position for all layouts, are ours. In a checkpoint's
state, "lanes" are the positions of the streams.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from torchtitan.data.identity import START_ANEW, refuse_other_data
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.stream_dataset import StreamDataset
from torchtitan.data.worker_processes import (
    iterator_states,
    start_worker,
    stateful_dataloader,
    worker_context,
)
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.logging import logger

# Batches reach the trainer through shared memory, of which a container often has 64 MiB for all
# ranks of a node.
_BYTES_AHEAD = 4 * 2**20


class ParallelAwareDataLoader:
    """Iterates over the batches of one data-parallel rank.

    The position of the run is what all ranks know together: `merge_states` of every rank's
    `local_state()` is stored once, and `load_state_dict` takes it in any layout. It is the position
    behind the last batch handed out, however many the workers have prepared beyond it. It is made
    of what JSON can hold, so loading it never runs anything.

    batches_at_once: the most batches that are asked for in a row, those of a step; workers have as
        many ready, if they fit into `_BYTES_AHEAD`
    """

    def __init__(self, dataset: StreamDataset, batches_at_once: int = 1) -> None:
        self._dataset, self._batches_at_once = dataset, batches_at_once
        self._begin(0, {}, 0, {})
        self._loader = self._make_loader()

    @property
    def _slice(self) -> RankSlice:
        return self._dataset.rank_slice

    @property
    def skipped_documents(self) -> int:
        """Unusable documents passed over so far; summed over the ranks, those of the run."""
        return self._skipped + sum(state["skipped_documents"] for state in self._progress())

    @property
    def tokens_of(self) -> dict[str, int]:
        """Tokens that each dataset of a blend has given; summed over the ranks, to the run."""
        given = dict(self._tokens_of)
        for state in self._progress():
            for name, tokens in state["tokens_of"].items():
                given[name] += tokens
        return given

    def identity(self) -> dict[str, Any]:
        """Facts that the examples depend on: the data, and how it is cut."""
        return self._dataset.identity()

    def _make_loader(self):
        workers = self._slice.num_workers
        return stateful_dataloader(
            self._dataset,
            batch_size=self._slice.batch_size,
            num_workers=workers,
            multiprocessing_context=worker_context(self._dataset) if workers else None,
            worker_init_fn=start_worker,
            prefetch_factor=self._batches_ahead() if workers else None,
            # torch draws a seed for the workers: from here, so that the run's own random
            # numbers are the same however often an iteration starts.
            generator=torch.Generator().manual_seed(0),
        )

    def _batches_ahead(self) -> int:
        """Batches that each worker has ready."""
        workers, batch_size = self._slice.num_workers, self._slice.batch_size
        # Tokens and labels, int64.
        batch_bytes = 2 * 8 * batch_size * self._dataset.settings.seq_len
        fitting = _BYTES_AHEAD // batch_bytes
        return max(2, math.ceil(min(self._batches_at_once, fitting) / workers))

    def _progress(self) -> list[dict[str, Any]]:
        """States of the processes that make this rank's examples, behind the last batch handed out.
        None before the first batch: asking for them would start the workers."""
        return iterator_states(self._loader.state_dict()) if self._begun else []

    def __iter__(self) -> Iterator[Any]:
        """Begin at the loaded position, once; and otherwise at the beginning of the data."""
        if self._begun:
            self._begin(0, {}, 0, {})
        return self._iterate()

    def resize(self, state: dict[str, Any], *, batch_size: int, seq_len: int) -> None:
        """Change the batches from here on, also those of the iterator in use.

        state: merged state of now
        batch_size: examples per batch of a rank
        seq_len: tokens per example
        """
        self._dataset.resize(replace(self._slice, batch_size=batch_size), seq_len)
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

    def _batches_of(self, loader) -> Iterator[Any]:
        try:
            for batch in loader:
                self._begun = True
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
                f"a process of training.dataset_num_workers = {self._slice.num_workers} that reads "
                f"the data has ended ({' '.join(str(error).split())}), perhaps for want of memory; "
                "set fewer and start the run again: it resumes from its newest checkpoint."
            ) from None

    def local_state(self) -> dict[str, Any]:
        """Part of the position that this rank knows, for `merge_states`."""
        assert self._dataset.settings.infinite, (
            "a single pass through the data has no position to resume"
        )
        loaded = {index: json.dumps(p) for index, p in self._dataset.positions.items()}
        states, first_rank = self._progress(), self._slice.dp_rank == 0
        # All ranks have loaded the same positions, and those are long: the first rank reports them.
        known = [loaded] if first_rank else []
        for state in states:
            known.append({n: p for n, p in state["streams"].items() if p != loaded.get(n)})
        positions = ({str(n): json.loads(p) for n, p in texts.items()} for texts in known)
        taken = sum(state["examples"] for state in states)
        return {
            "dp_rank": self._slice.dp_rank,
            "consumed": self._dataset.consumed + taken * self._slice.dp_degree,
            "lanes": _newest(positions),
            "identity": self._dataset.identity() if first_rank else {},
            "skipped_documents": self.skipped_documents,
            "tokens_of": self.tokens_of,
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
            positions = {int(index): position for index, position in state["lanes"].items()}
            _check_complete(state["consumed"], positions, self._dataset.num_streams)
            skipped, tokens_of = int(state["skipped_documents"]), state.get("tokens_of", {})
            self._begin(int(state["consumed"]), positions, skipped, tokens_of)
        except UserError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"The checkpoint's data position is damaged ({type(error).__name__}: {error}); "
                f"take another checkpoint, {START_ANEW}."
            ) from None

    def _begin(
        self, consumed: int, positions: dict[int, dict], skipped: int, tokens_of: dict[str, int]
    ) -> None:
        """Let the next iteration begin there. Counts of the run so far are kept by one rank, as
        they are summed over the ranks."""
        self._dataset.start(consumed, positions)
        self._begun = False  # whether a batch has been handed out since
        first_rank = self._slice.dp_rank == 0
        self._skipped = skipped if first_rank else 0
        known = tokens_of if first_rank else {}
        self._tokens_of = {name: int(known.get(name, 0)) for name in self._dataset.names}


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The position of the run from the `local_state()` of all ranks, in any order.

    Ranks that share their data (tensor parallelism) may all be there.
    """
    ranks = {state["dp_rank"]: state for state in states}
    consumed = {state["consumed"] for state in ranks.values()}
    assert len(consumed) == 1, f"the ranks have taken different numbers of batches: {consumed}"
    positions = _newest(state["lanes"] for state in ranks.values())
    return {
        "consumed": consumed.pop(),
        "lanes": dict(sorted(positions.items(), key=lambda item: int(item[0]))),
        "identity": ranks[0]["identity"],
        "skipped_documents": sum(state["skipped_documents"] for state in ranks.values()),
        "tokens_of": {
            name: sum(state["tokens_of"][name] for state in ranks.values())
            for name in states[0]["tokens_of"]
        },
    }


def _newest(known: Iterable[dict[str, dict]]) -> dict[str, dict]:
    """Position of each stream, from the process that took its last example."""
    newest: dict[str, dict] = {}
    for positions in known:
        for index, position in positions.items():
            if index not in newest or position["taken"] > newest[index]["taken"]:
                newest[index] = position
    return newest


def build_dataloader(dataset: StreamDataset, batches_at_once: int = 1) -> ParallelAwareDataLoader:
    """Loader of the dataset's examples. Raises `UserError` for impossible sizes."""
    rank_slice = dataset.rank_slice
    for name, value, least in (
        ("batch_size", rank_slice.batch_size, 1),
        ("num_workers", rank_slice.num_workers, 0),
    ):
        if value < least:
            raise UserError(f"The data loader's {name} = {value} must be at least {least}.")
    assert 0 <= rank_slice.dp_rank < rank_slice.dp_degree, rank_slice
    return ParallelAwareDataLoader(dataset, batches_at_once)


def _check_complete(consumed: int, positions: dict[int, dict], num_streams: int) -> None:
    """Raise ValueError unless each stream has given its part of the `consumed` examples."""
    if consumed < 0 or positions.keys() - range(num_streams):
        raise ValueError(f"{consumed} examples of streams {sorted(positions)}")
    for index in range(num_streams):
        due = len(range(index, consumed, num_streams))
        taken = positions[index]["taken"] if index in positions else 0
        if taken != due:
            raise ValueError(f"stream {index} has given {taken} of {due} examples")
