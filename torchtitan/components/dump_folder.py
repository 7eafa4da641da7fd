"""The folders of a run's outputs: can they be written, and by this run alone; what the run was told
goes there."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from torchtitan.config import JobConfig, to_dict
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.folder_lock import NAME, FolderLock
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type


def check_dump_folder(dump_folder: str) -> None:
    """Raise `UserError` where it can't be made or written to; makes nothing yet."""
    folder = Path(dump_folder)
    candidates = (folder, *folder.absolute().parents)
    nearest = next(path for path in candidates if os.path.exists(path))
    if not nearest.is_dir():
        raise _not_writable(folder, f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _not_writable(folder, f"no permission in {nearest}")


def _not_writable(folder: Path, reason: str) -> UserError:
    return UserError(
        f"job.dump_folder {folder} can't be written to ({reason}): name a folder that can."
    )


def own_folders(config: JobConfig) -> dict[Path, str]:
    """The folders that the run writes to as its own, each with the key that names it."""
    checkpoint, profiling, metrics, comm = (
        config.checkpoint,
        config.profiling,
        config.metrics,
        config.comm,
    )
    inside = {
        "checkpoint.folder": checkpoint.enable and not checkpoint.load_only and checkpoint.folder,
        "profiling.save_traces_folder": profiling.enable_profiling and profiling.save_traces_folder,
        "profiling.save_memory_snapshot_folder": (
            profiling.enable_memory_snapshot and profiling.save_memory_snapshot_folder
        ),
        "metrics.save_tb_folder": metrics.enable_tensorboard and metrics.save_tb_folder,
        "comm.save_traces_folder": (
            device_type() == "cuda" and comm.trace_buf_size > 0 and comm.save_traces_folder
        ),
    }
    dump_folder = Path(config.job.dump_folder)
    folders = {dump_folder.resolve(): "job.dump_folder"}
    for key, folder in inside.items():
        if folder:
            folders.setdefault((dump_folder / folder).resolve(), key)
    return folders


@contextmanager
def alone_in_folders(config: JobConfig) -> Iterator[None]:
    """Keep other runs out of this one's folders. Raises `UserError` where another one is in."""
    with ExitStack() as locks:
        for folder, key in own_folders(config).items():
            lock = FolderLock(folder / NAME, f"{key} {folder}", f"name another {key}")
            try:
                locks.enter_context(lock)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(
                    f"{key} {folder} can't be written to ({reason}): name a folder that can."
                ) from None
        yield


def save_config(config: JobConfig, model_args: BaseModelArgs) -> None:
    """Write beside the outputs what the run was told, and the model arguments that came of it.

    Two files: the first may be given back as `job.config_file`, and a flavor or sequence length set
    then must not meet arguments that an earlier one led to.
    """
    settings = json.dumps(to_dict(config), indent=2)
    arguments = json.dumps(asdict(model_args), indent=2)
    if config.job.print_config:
        logger.info("Config: %s", settings)
        logger.info("Model arguments: %s", arguments)
    folder = Path(config.job.dump_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / config.job.save_config_file).write_text(settings + "\n")
        (folder / "model_args.json").write_text(arguments + "\n")
    except OSError as error:
        raise _not_writable(folder, error.strerror) from None
