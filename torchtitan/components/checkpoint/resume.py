"""Which checkpoint a run begins from, and whether it is one of this run's model."""

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
    """Where a run begins: a checkpoint and the parts to take from it, or (path None) anew.

    step, tokens_seen: done already. seed: of the run that is gone on with. in_hf: path is in
    Hugging Face's format.
    """

    path: Path | None = None
    step: int = 0
    tokens_seen: int = 0
    seed: int | None = None
    parts: frozenset[str] = frozenset()
    in_hf: bool = False


class CheckpointChoice:
    """Looks for checkpoints in `folder`. Every method is called on all ranks and gives all of them
    the same answer; they share the reading of checksummed files."""

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
        """The newest checkpoint of this run that is whole and can be gone on from; says which ones
        it passes over. Raises `UserError` where there are some, but none will do."""
        unusable = []
        there = self._ranks.from_rank_0(lambda: steps_with_folder(self.folder))
        for step, complete in sorted(there.items(), reverse=True):
            path = step_folder(self.folder, step)
            if not complete:
                self._warn("%s is no complete checkpoint and is passed over", path)
                continue
            problem = self._damage(path)
            if problem is None and not self._can_go_on_from(path):
                problem = "it holds only weights, and the run is not at its end there"
            if problem is None:
                return path
            unusable.append(f"{path} ({problem})")
            self._warn("Checkpoint %s is passed over: %s", path, problem)
        if unusable:
            raise UserError(
                f"no checkpoint in {self.folder} can be gone on from: {'; '.join(unusable)}; start "
                "from weights with checkpoint.initial_load_path and another checkpoint.folder, or "
                "move these away to start anew."
            )
        return None

    def start_of(self, path: Path, parts: set[str]) -> Start:
        """All of `parts` that the checkpoint has and the config doesn't exclude."""
        meta = read_json(path, META)
        excluded = parts & set(self.settings.exclude_from_loading)
        if excluded:
            names = ", ".join(sorted(excluded))
            self._warn("%s: not loaded, as of checkpoint.exclude_from_loading: %s", path, names)
        parts = parts - excluded
        if meta["content"] == WEIGHTS:
            parts -= {"optimizer", "rng"}
            # One that was converted from another format knows of no run.
            of_runs = {"lr_scheduler", "dataloader", "train_state"}
            parts -= of_runs - read_json(path, NUMBERS).keys()
        going_on = "train_state" in parts
        return Start(
            path,
            step=meta["step"] if going_on else 0,
            tokens_seen=meta["tokens_seen"] if going_on else 0,
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
        there = self._ranks.from_rank_0(lambda: steps_with_folder(self.folder))
        if not there.get(wanted):
            whole = [str(step) for step, complete in there.items() if complete]
            choice = f"it has {', '.join(whole)}" if whole else "it has none at all"
            raise UserError(
                f"checkpoint.load_step = {wanted}, but {self.folder} has no complete checkpoint of "
                f"that step ({choice}); name one of them, or -1 for the newest."
            )
        path = step_folder(self.folder, wanted)
        self._refuse_damaged(path, f"checkpoint.load_step = {wanted}")
        return path

    def _can_go_on_from(self, path: Path) -> bool:
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


# ------------------------------------------------------------------ does it fit?


def refuse_other_model(path: Path, meta: dict[str, Any], identity: Identity) -> None:
    """Raise `UserError` for a checkpoint of another model, by what its meta.json says."""
    ours, there = _flat(identity.model_args), _flat(meta["model"]["args"])
    ours["model.name"], there["model.name"] = identity.model, meta["model"]["name"]
    differing = [
        f"{name} ({there.get(name)} there, {ours.get(name)} here)"
        for name in sorted(ours.keys() | there.keys())
        if ours.get(name) != there.get(name)
    ]
    if differing:
        raise UserError(
            f"checkpoint {path} is of model {meta['model']['name']} {meta['model']['flavor']}, and "
            f"this run's ({identity.model} {identity.flavor}) differs in {_first_few(differing)}; "
            "set model.flavor and model.args as there, or take another checkpoint."
        )


def refuse_other_tensors(
    path: Path, index: Metadata, tensors: dict[str, torch.Tensor], ranks: ObjectCollectives
) -> None:
    """Raise `UserError` where `tensors` of all ranks together are not what the checkpoint has."""
    gathered = ranks.gather((compare_tensors(index, tensors), list(tensors)))
    problems = {problem for found, _ in gathered for problem in found}
    wanted = {name for _, names in gathered for name in names}
    if any(name.startswith("model.") for name in wanted):
        there = {name for name in index.state_dict_metadata if name.startswith("model.")}
        problems |= {f"{name} is not part of this model" for name in there - wanted}
    if problems:
        raise UserError(
            f"checkpoint {path} does not fit this run: {_first_few(sorted(problems))}; take one of "
            "the same model and optimizer, or leave parts out with checkpoint.exclude_from_loading."
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
