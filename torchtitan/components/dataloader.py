"""Batches of one data-parallel rank: torchdata's StatefulDataLoader, our rules for its state."""

import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torchdata.stateful_dataloader import StatefulDataLoader

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger, logger

# In the dictionary of an example: how many documents the dataset passed over on the way to it.
SKIPPED = "skipped_documents"

_START_ANEW = (
    'or begin the data anew with checkpoint.exclude_from_loading = ["dataloader"] and keep the rest'
)


class ResumableDataset(Protocol):
    """An IterableDataset whose state_dict is its position, and which says what that depends on."""

    def identity(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def __iter__(self) -> Iterator[Any]: ...


class ParallelAwareDataLoader(Stateful):
    """Iterates over batches; its state has one entry for each data-parallel rank.

    state_dict() is {"dp_rank_<r>": text, "dp_degree": n}: merged over the ranks it is the position
    of the whole run. The entry is JSON, so loading it never runs anything. It is the position
    after the last batch handed out, however many the workers have prepared beyond it.

    `skipped_documents` is how many unusable documents of this rank lie before that position.
    """

    def __init__(
        self,
        dataset: ResumableDataset,
        *,
        batch_size: int,
        num_workers: int,
        dp_rank: int,
        dp_degree: int,
    ) -> None:
        self._identity = dataset.identity()
        self._num_workers = num_workers
        self._dp_degree = dp_degree
        self._key = f"dp_rank_{dp_rank}"
        self.skipped_documents = 0
        with warnings.catch_warnings():
            # torchdata 0.11 still calls torch.set_vital, which torch 2.13 warns about.
            warnings.filterwarnings("ignore", message=".*set_vital.*")
            self._loader = StatefulDataLoader(
                dataset,
                batch_size=batch_size,
                num_workers=num_workers,
                multiprocessing_context=_worker_context(dataset) if num_workers else None,
                worker_init_fn=_start_worker,
                # torch draws a seed for the workers: from here, so that the run's own random
                # numbers are the same however often an iteration starts.
                generator=torch.Generator().manual_seed(0),
            )

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self._loader:
                self.skipped_documents += _take_skipped(batch)
                yield batch
        except UserError as error:
            # From a worker it comes wrapped in that worker's traceback; the sentence is the end.
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None

    def state_dict(self) -> dict[str, Any]:
        entry = {
            "num_workers": self._num_workers,
            "identity": self._identity,
            "skipped_documents": self.skipped_documents,
            "loader": self._loader.state_dict(),
        }
        return {self._key: json.dumps(entry), "dp_degree": self._dp_degree}

    def local_state(self) -> dict[str, Any]:
        return self.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            logger.warning(
                "The checkpoint has no data position: the data starts from its beginning"
            )
            return
        degree = state_dict.get("dp_degree")
        _check_same("the data-parallel degree", degree, self._dp_degree)
        if self._key not in state_dict:
            raise UserError(
                f"The checkpoint's data position has no entry '{self._key}' (it has "
                f"{sorted(state_dict)}), so it is damaged; take another checkpoint, {_START_ANEW}."
            )
        entry = json.loads(state_dict[self._key])
        _check_same("training.dataset_num_workers", entry["num_workers"], self._num_workers)
        saved = entry["identity"]
        for name in sorted(saved.keys() | self._identity.keys()):
            _check_same(name, saved.get(name), self._identity.get(name))
        self.skipped_documents = entry["skipped_documents"]
        self._loader.load_state_dict(entry["loader"])


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The position of the whole run from `local_state()` of all ranks."""
    return {name: value for state in states for name, value in state.items()}


def build_dataloader(
    dataset: ResumableDataset,
    *,
    batch_size: int,
    num_workers: int,
    dp_rank: int,
    dp_degree: int,
) -> ParallelAwareDataLoader:
    """A loader over what is already this rank's part of the data (the dataset splits it)."""
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise UserError(f"The data loader's {name} = {value} must be at least {least}.")
    assert 0 <= dp_rank < dp_degree, (dp_rank, dp_degree)
    return ParallelAwareDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
    )


def _take_skipped(batch: Any) -> int:
    """Remove the count from a batch of (dictionary, labels); other datasets have none."""
    if isinstance(batch, list | tuple) and isinstance(batch[0], dict) and SKIPPED in batch[0]:
        return int(batch[0].pop(SKIPPED).sum())
    return 0


def _check_same(what: str, saved: object, ours: object) -> None:
    if saved != ours:
        raise UserError(
            f"The checkpoint's data position was saved with {what} = {saved}, and this run has "
            f"{ours}; resume with {saved}, {_START_ANEW}."
        )


def _worker_context(dataset: ResumableDataset) -> multiprocessing.context.BaseContext:
    """Workers come from a clean server process, not as forks of the trainer: a fork copies the
    locks of CUDA's, NCCL's and gloo's threads without the threads, and may wait for them forever.
    """
    context = multiprocessing.get_context("forkserver")
    # Imported once in the server instead of once in each worker.
    context.set_forkserver_preload([__name__, type(dataset).__module__])
    return context


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
