"""Weights & Biases: the same curves, image and texts as TensorBoard.

The package reads WANDB_MODE, WANDB_API_KEY and so on by itself. The variables of torchtitan's users
that name a run: WANDB_PROJECT (default: torchtitan), WANDB_TEAM (or WANDB_ENTITY), WANDB_RUN_NAME,
WANDB_RUN_ID, WANDB_RUN_NOTES, WANDB_RUN_TAGS (with commas), WANDB_RUN_GROUP, WANDB_RUN_JOB_TYPE,
WANDB_RESUME_FROM and WANDB_FORK_FROM.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.components.metrics.names import curves
from torchtitan.components.metrics.writers import Record
from torchtitan.tools.disk import SideOutput, write_whole
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

_RUN_ID = "wandb_run_id.txt"


def check_wandb(enable: bool) -> None:
    """Raise `UserError` where Weights & Biases is wanted but not installed."""
    if enable and find_spec("wandb") is None:
        raise UserError(
            "metrics.enable_wandb = true needs the package wandb, which is not installed; run "
            "pip install wandb, or set it to false."
        )


class WandbWriter:
    """Sends records. A failure is logged, and ends neither the run nor later attempts.

    A resumed run continues the run of Weights & Biases that its folder names. Curves are over
    `step`, which we send as a number: its own count of steps can't go back, and would refuse steps
    that are done again. (Such a step is there twice, the newer value last.)

    parent: folder for its files.
    config: settings of the run.
    suffix: of this rank, where all ranks write; empty for rank 0.
    """

    def __init__(self, parent: Path, start_step: int, config: dict[str, Any], suffix: str) -> None:
        self._run: Any = None
        self._output = SideOutput("Weights & Biases", parent, "later records are tried")
        with self._output.attempt(Exception):
            import wandb

            self._wandb: Any = wandb
            parent.mkdir(parents=True, exist_ok=True)
            id_file = parent / _RUN_ID
            earlier = id_file.read_text().strip() if start_step and id_file.exists() else None
            self._run = wandb.init(dir=str(parent), config=config, **_settings(earlier, suffix))
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
            write_whole(id_file, f"{self._run.id}\n".encode())
            logger.info(f"metrics: Weights & Biases has this run at {self._run.url or parent}")

    def write(self, record: Record, heatmap: np.ndarray | None) -> None:
        sent: dict[str, Any] = curves(record)
        if heatmap is not None and self._run is not None:
            sent["expert_load"] = self._wandb.Image(heatmap)
        self._send(record["step"], sent)

    def write_texts(self, texts: Mapping[str, str], step: int) -> None:
        """texts: by prompt."""
        if texts and self._run is not None:
            rows = [list(pair) for pair in texts.items()]
            self._send(step, {"samples": self._wandb.Table(columns=["prompt", "text"], data=rows)})

    def rewind(self, step: int) -> None:
        """Do nothing: what was sent can't be removed."""

    def _send(self, step: int, numbers: dict[str, Any]) -> None:
        if self._run is not None:
            with self._output.attempt(Exception):
                self._run.log({"step": step, **numbers})

    def close(self) -> None:
        if self._run is not None:
            with self._output.attempt(Exception):
                self._run.finish()
            self._run = None


def _settings(earlier: str | None, suffix: str) -> dict[str, Any]:
    """Arguments of wandb.init, those that are set.

    earlier: id of the run that is resumed.
    """
    get = os.environ.get
    run_id, name = get("WANDB_RUN_ID") or None, get("WANDB_RUN_NAME") or None
    if suffix:  # one run of Weights & Biases for each rank
        run_id, name = (each and f"{each}_{suffix}" for each in (run_id, name))
    tags = [tag.strip() for tag in get("WANDB_RUN_TAGS", "").split(",") if tag.strip()]
    branch = {"resume_from": get("WANDB_RESUME_FROM"), "fork_from": get("WANDB_FORK_FROM")}
    found = {
        "project": get("WANDB_PROJECT") or "torchtitan",
        "entity": get("WANDB_TEAM") or get("WANDB_ENTITY"),
        "name": name,
        "id": earlier or run_id,
        "notes": get("WANDB_RUN_NOTES"),
        "tags": tags or None,
        "group": get("WANDB_RUN_GROUP"),
        "job_type": get("WANDB_RUN_JOB_TYPE"),
        "resume": None if any(branch.values()) else "allow",
        **branch,
    }
    return {name: value for name, value in found.items() if value}
