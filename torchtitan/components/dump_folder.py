"""The folders of a run: checks, locks against other runs, and the config beside the outputs."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from torchtitan.components.checkpoint.folder import steps_with_folder
from torchtitan.config import JobConfig, to_dict
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.disk import SideOutput, check_readable, check_writable, write_whole
from torchtitan.tools.errors import UserError
from torchtitan.tools.folder_lock import NAME, FolderLock
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type


def check_folders(config: JobConfig, device_type: str) -> None:
    """Raise `UserError` where a folder that this run writes to can't be created or written to, or
    one that it reads can't be read. Creates nothing yet."""
    dump_folder, checkpoint = Path(config.job.dump_folder), config.checkpoint
    check_writable("job.dump_folder", dump_folder)
    for key, folder, is_used in _folders_inside(config, device_type):
        if is_used:
            check_writable(key, dump_folder / folder)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        if config.compile.enable and os.environ.get(name):
            check_writable(name, os.environ[name])
    own = dump_folder / checkpoint.folder
    if checkpoint.enable and checkpoint.load_only:
        check_readable("checkpoint.folder", own)
    if checkpoint.enable and checkpoint.initial_load_path and not steps_with_folder(own):
        check_readable("checkpoint.initial_load_path", checkpoint.initial_load_path)


def _folders_inside(config: JobConfig, device_type: str) -> list[tuple[str, str, bool]]:
    """List key, folder (in job.dump_folder or anywhere), and whether this run writes to it."""
    profiling, metrics, memory = config.profiling, config.metrics, config.activation_checkpoint
    saves = config.checkpoint.enable and not config.checkpoint.load_only
    records_collectives = device_type == "cuda" and config.comm.trace_buf_size > 0
    return [
        ("checkpoint.folder", config.checkpoint.folder, saves),
        (
            "profiling.save_traces_folder",
            profiling.save_traces_folder,
            profiling.enable_profiling,
        ),
        (
            "profiling.save_memory_snapshot_folder",
            profiling.save_memory_snapshot_folder,
            profiling.enable_memory_snapshot,
        ),
        ("metrics.save_tb_folder", metrics.save_tb_folder, metrics.enable_tensorboard),
        ("comm.save_traces_folder", config.comm.save_traces_folder, records_collectives),
        (
            "activation_checkpoint.visualize_memory_budget_pareto: folder",
            "memory_budget_pareto",
            memory.visualize_memory_budget_pareto,
        ),
    ]


def own_folders(config: JobConfig) -> dict[Path, str]:
    """List the folders that this run alone may write to, each with the key that names it."""
    dump_folder = Path(config.job.dump_folder)
    folders = {dump_folder.resolve(): "job.dump_folder"}
    for key, folder, is_used in _folders_inside(config, device_type()):
        if is_used:
            folders.setdefault((dump_folder / folder).resolve(), key)
    return folders


@contextmanager
def alone_in_folders(config: JobConfig) -> Iterator[None]:
    """Lock this run's folders. Raises `UserError` where another run holds one of them."""
    with ExitStack() as locks:
        for folder, key in own_folders(config).items():
            lock = FolderLock(folder / NAME, f"{key} {folder}", f"name another {key}")
            try:
                locks.enter_context(lock)
            except OSError as error:
                reason = error.strerror or error
                sentence = f"{key} {folder} can't be written to ({reason}): name a writable folder."
                if os.path.lexists(folder / NAME):  # the folder is fine then
                    sentence = (
                        f"{key} {folder}: its lock file {folder / NAME} can't be used ({reason}); "
                        f"remove it where no run uses the folder, or name another {key}."
                    )
                raise UserError(sentence) from None
        yield


def save_config(config: JobConfig, model_args: BaseModelArgs) -> None:
    """Write the settings of the run, and the model arguments that follow from them, beside its
    outputs.

    They are two files because the first may be used as `job.config_file` of another run: a flavor
    or sequence length set there must not clash with arguments that followed from earlier ones.
    """
    settings = json.dumps(to_dict(config), indent=2)
    arguments = json.dumps(asdict(model_args), indent=2)
    if config.job.print_config:
        logger.info("Config: %s", settings)
        logger.info("Model arguments: %s", arguments)
    folder = Path(config.job.dump_folder)
    for name, text in ((config.job.save_config_file, settings), ("model_args.json", arguments)):
        path = folder / name
        with SideOutput(str(path), folder, "the settings of this run are not saved").attempt():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{text}\n".encode())
