"""torchdata's loader, and worker processes that outlive signals and end with their trainer.

StatefulDataLoader starts the workers, feeds them, and brings each one's state with its batches.
Here are the parts it leaves to us: which kind of process a worker is, and when it must end.
"""

import atexit
import multiprocessing
import os
import threading
import warnings
from multiprocessing.context import BaseContext
from typing import Any

from torch.utils.data import IterableDataset

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger


def stateful_dataloader(dataset: IterableDataset, **arguments: Any):
    """Make a StatefulDataLoader. Raises `UserError` where `torchdata` is missing: the package is
    imported only here, and all that loads no data runs without it.

    dataset: its iterator has `state_dict` and `load_state_dict`
    arguments: those of StatefulDataLoader
    """
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchdata":
            raise
        raise UserError(
            "Loading data needs the package torchdata, which this Python has not; install it with "
            "pip install torchdata (0.11 or newer)."
        ) from None
    with warnings.catch_warnings():  # torchdata 0.11 calls it, torch 2.13 warns of it
        warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)
        return StatefulDataLoader(dataset, **arguments)


def iterator_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """States of the datasets' iterators in a StatefulDataLoader's state: one of each worker, or
    the one of this process."""
    snapshot = state.get("_snapshot")
    processes = [state] if snapshot is None else snapshot["_worker_snapshots"].values()
    return [process["fetcher_state"]["dataset_iter_state"] for process in processes]


def worker_context(dataset: IterableDataset) -> BaseContext:
    """Context in which workers come from a clean server process, not as forks of the trainer: a
    fork copies the locks of CUDA's, NCCL's and gloo's threads without the threads, and may wait for
    them forever.

    A run's signals are blocked in its children (`SignalListener`), SIGTERM among them, with which
    multiprocessing ends what is left of them at exit, to wait for them then: they are killed first.
    """
    atexit.register(_kill_workers)
    context = multiprocessing.get_context("forkserver")
    # Imported once in the server instead of once in each worker.
    modules = [__name__, type(dataset).__module__, "torchdata.stateful_dataloader"]
    context.set_forkserver_preload(modules)
    return context


def _kill_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def start_worker(worker: int) -> None:
    """Prepare a new worker process; StatefulDataLoader calls it there with the worker's index."""
    init_logger()  # a fresh process has no log handlers
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    """Exit when the trainer has. torch's own watch looks whether the worker's parent lives, and
    that is the server, which in turn lives as long as any worker: after a kill of the trainer both
    would stay for ever."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "called outside of a worker"
    trainer.join()
    os._exit(1)
