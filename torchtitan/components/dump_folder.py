"""The folder of a run's outputs: can it be written, and what the run was told goes there."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from torchtitan.config import JobConfig, to_dict
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


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
