"""The choice of the checkpoint that a run begins from, and checks that it fits the run's model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan.components.checkpoint.dcp_storage import compare_tensors
from torchtitan.components.checkpoint.folder import (
    META,
    NUMBERS,
    damage,
    read_json,
    require_checkpoint,
    step_folder,
    steps_with_folder,
)
from torchtitan.components.checkpoint.meta import EVERYTHING, WEIGHTS, Identity
from torchtitan.config import CHECKPOINT_PARTS, Checkpoint
from torchtitan.distributed.utils import ObjectCollectives
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


@dataclass(frozen=True)
class Start:
    """Start of a run: a checkpoint and the parts to load from it, or (path None) a new run.

    path: of the checkpoint; None = a new run.
    step, tokens_seen: done already.
    seed: of the run that is resumed; None = not stored, or not resumed.
    parts: to load, of `CHECKPOINT_PARTS`.
    in_hf: whether path is in Hugging Face's format.
    """

    path: Path | None = None
    step: int = 0
    tokens_seen: int = 0
    seed: int | None = None
    parts: frozenset[str] = frozenset()
    in_hf: bool = False


class CheckpointChoice:
    """Searches `folder` for the checkpoint to begin from.

    Every method must be called on all ranks, and returns the same on all of them; ranks share the
    work of reading files to check them.
    """

    def __init__(
        self, settings: Checkpoint, folder: Path, total_steps: int, ranks: ObjectCollectives
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.total_steps = total_steps
        self._ranks = ranks

    def find_start(self) -> Start:
        """See `CheckpointManager.find_start`."""
        path = self._named_step() if self.settings.load_step >= 0 else self.newest()
        if path is not None:
            return self.start_of(path, set(CHECKPOINT_PARTS))
        return self._initial_load()

    def newest(self) -> Path | None:
        """Find the newest checkpoint of this run that is complete and can be resumed from.

        Logs which ones it skips. Raises `UserError` where checkpoints exist, but none is usable.
        """
        unusable, of_weights = [], list[int]()
        found = self._ranks.from_rank_0(lambda: steps_with_folder(self.folder))
        for step, complete in sorted(found.items(), reverse=True):
            path = step_folder(self.folder, step)
            if not complete:
                self._warn("%s is not a complete checkpoint and is skipped", path)
                continue
            problem = self._damage(path)
            if problem is None and not self._is_resumable(path):
                problem = "it holds only weights, and its step is not the run's last one"
                of_weights.append(step)
            if problem is None:
                return path
            unusable.append(f"{path} ({problem})")
            self._warn("Checkpoint %s is skipped: %s", path, problem)
        if unusable:
            way_out = (
                "start from weights with checkpoint.initial_load_path and another checkpoint.folder"
            )
            if of_weights:
                way_out = (
                    f"for one start set checkpoint.load_step = {of_weights[0]}, which goes on from "
                    "its weights with a new optimizer state (checkpoint.last_save_model_only = "
                    "false saves that, too)"
                )
            raise UserError(
                f"no checkpoint in {self.folder} can be resumed from: {'; '.join(unusable)}; "
                f"{way_out}, or move these away to start a new run."
            )
        return None

    def start_of(self, path: Path, parts: set[str]) -> Start:
        """Start with those of `parts` that the checkpoint has and the config doesn't exclude."""
        meta = read_json(path, META)
        excluded = parts & set(self.settings.exclude_from_loading)
        if excluded:
            names = ", ".join(sorted(excluded))
            self._warn("%s: not loaded because of checkpoint.exclude_from_loading: %s", path, names)
        parts = parts - excluded
        if meta["content"] == WEIGHTS:
            parts -= {"optimizer", "rng"}
            # A checkpoint that was converted from another format has no numbers of a run.
            of_runs = {"lr_scheduler", "dataloader", "train_state"}
            parts -= of_runs - read_json(path, NUMBERS).keys()
        resumes = "train_state" in parts
        return Start(
            path,
            step=meta["step"] if resumes else 0,
            tokens_seen=meta["tokens_seen"] if resumes else 0,
            seed=meta["seed"] if "dataloader" in parts else None,
            parts=frozenset(parts),
        )

    def _initial_load(self) -> Start:
        settings = self.settings
        if settings.initial_load_path is None:
            return Start()
        path = Path(settings.initial_load_path)
        if settings.initial_load_in_hf:
            return Start(path, parts=frozenset({"model"}), in_hf=True)
        require_checkpoint(path, "checkpoint.initial_load_path ")
        self._refuse_damaged(path, "checkpoint.initial_load_path")
        model_only = settings.initial_load_model_only
        return self.start_of(path, {"model"} if model_only else set(CHECKPOINT_PARTS))

    def _named_step(self) -> Path:
        wanted = self.settings.load_step
        found = self._ranks.from_rank_0(lambda: steps_with_folder(self.folder))
        if not found.get(wanted):
            whole = [str(step) for step, complete in found.items() if complete]
            choice = f"it has {', '.join(whole)}" if whole else "it has none at all"
            raise UserError(
                f"checkpoint.load_step = {wanted}, but {self.folder} has no complete checkpoint of "
                f"that step ({choice}); name one of them, or -1 for the newest."
            )
        path = step_folder(self.folder, wanted)
        self._refuse_damaged(path, f"checkpoint.load_step = {wanted}")
        return path

    def _is_resumable(self, path: Path) -> bool:
        meta = read_json(path, META)
        at_an_end = meta["step"] == 0 or meta["step"] >= self.total_steps
        return meta["content"] == EVERYTHING or at_an_end

    def _damage(self, path: Path) -> str | None:
        mine = damage(path, reader=self._ranks.rank, readers=self._ranks.count)
        return next((problem for problem in self._ranks.gather(mine) if problem), None)

    def _refuse_damaged(self, path: Path, key: str) -> None:
        problem = self._damage(path)
        if problem is not None:
            raise UserError(f"{key}: checkpoint {path} is damaged: {problem}; take another one.")

    def _warn(self, *message: Any) -> None:
        if self._ranks.rank == 0:
            logger.warning(*message)


# ------------------------------------------------------------------ checks that it fits


def refuse_other_model(path: Path, meta: dict[str, Any], identity: Identity) -> None:
    """Raise `UserError` for a checkpoint of another model, according to its meta.json."""
    ours, theirs = _flat(identity.model_args), _flat(meta["model"]["args"])
    ours["model.name"], theirs["model.name"] = identity.model, meta["model"]["name"]
    differing = [
        f"{name} ({theirs.get(name)} there, {ours.get(name)} here)"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise UserError(
            f"checkpoint {path} is of model {meta['model']['name']} {meta['model']['flavor']}, and "
            f"this run's ({identity.model} {identity.flavor}) differs in {_first_few(differing)}; "
            "set model.flavor and model.args as in the checkpoint, or take another one (for a new "
            "run: another job.dump_folder)."
        )


def refuse_other_tensors(
    path: Path, index: Metadata, tensors: dict[str, torch.Tensor], ranks: ObjectCollectives
) -> None:
    """Raise `UserError` where a checkpoint does not hold `tensors` of all ranks together."""
    gathered = ranks.gather((compare_tensors(index, tensors), list(tensors)))
    problems = {problem for found, _ in gathered for problem in found}
    wanted = {name for _, names in gathered for name in names}
    if any(name.startswith("model.") for name in wanted):
        stored = {name for name in index.state_dict_metadata if name.startswith("model.")}
        problems |= {f"{name} is not part of this model" for name in stored - wanted}
    if problems:
        raise UserError(
            f"checkpoint {path} does not fit this run: {_first_few(sorted(problems))}; take one of "
            "the same model and optimizer (for a new run: another job.dump_folder), or leave parts "
            "out with checkpoint.exclude_from_loading."
        )


def _flat(arguments: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _first_few(items: list[str], count: int = 4) -> str:
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")
