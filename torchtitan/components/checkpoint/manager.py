"""Saving and loading of a run's checkpoints, with the handling of failures.

A save may fail (on a full disk, for example): the failure is logged, older checkpoints stay as they
are, training continues and the next interval tries again. Only the last save of a run must succeed.
Loading takes the newest complete checkpoint of the run's own folder; a damaged one is skipped.

All methods are called on all ranks at the same step; DCP's protocol makes ranks agree on failures.
"""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from torchtitan.components.checkpoint.adapters import AdapterFiles
from torchtitan.components.checkpoint.dcp_storage import (
    CheckpointReader,
    CheckpointWriter,
    read_tensor_index,
    reason_of_failure,
)
from torchtitan.components.checkpoint.detect import args_at_start
from torchtitan.components.checkpoint.folder import (
    META,
    NUMBERS,
    clean_up,
    read_json,
    step_folder,
    steps_with_folder,
)
from torchtitan.components.checkpoint.meta import (
    EVERYTHING,
    WEIGHTS,
    Identity,
    make_meta,
)
from torchtitan.components.checkpoint.resume import (
    CheckpointChoice,
    Start,
    refuse_other_model,
    refuse_other_tensors,
)
from torchtitan.components.checkpoint.run_state import RunState
from torchtitan.components.checkpoint.stager import build_stager
from torchtitan.components.checkpoint.trained_parts import (
    refuse_other_adapters,
    refuse_other_frozen,
    stored_tensors,
)
from torchtitan.components.huggingface.folder import plan_layout
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.components.optimizer.ema import has_average
from torchtitan.config import CHECKPOINT_PARTS, Checkpoint
from torchtitan.distributed.groups import group_of
from torchtitan.distributed.utils import ObjectCollectives
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.tools.disk import reason
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import TORCH_DTYPES

# Timeout of collectives in a save or load, in which fast ranks wait for the slowest disk.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class _Pending:
    """A save in the background.

    step: of the checkpoint.
    started: time at which the save began, in seconds.
    staged: done when the tensors are copied, so that weights may change; None = they are.
    written: done when the checkpoint is on disk.
    """

    step: int
    started: float
    staged: Future | None
    written: Future
    writer: CheckpointWriter


class CheckpointManager:
    """Saves and restores one run.

    folder: of the run's checkpoints.
    total_steps: steps of the run; the last one is always saved.
    identity: of the model, for meta.json.
    adapter: converts to and from Hugging Face's format; None where the model has no such format.
    lora: low-rank adapters of the run; None = it has none.
    """

    def __init__(
        self,
        settings: Checkpoint,
        *,
        folder: Path,
        total_steps: int,
        identity: Identity,
        adapter: StateDictAdapter | None,
        lora: AdapterFiles | None = None,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.total_steps = total_steps
        self.identity = identity
        self.saves = settings.enable and not settings.load_only
        self.seed = 0  # of this run; set by the trainer
        self.group: dist.ProcessGroup | None = None
        self._adapter = adapter
        self._lora = lora
        # Records an event of the run; set by the trainer.
        self.on_event: Callable[..., None] = lambda step, kind, **facts: None
        self._choice: CheckpointChoice | None = None
        self._pending: _Pending | None = None
        self._failed: str | None = None  # why the last save failed
        self._stager: DefaultStager | None = None
        if settings.enable:
            # A group of its own: saves in the background must not mix with training's collectives,
            # and their waits must not count against comm.train_timeout_seconds.
            everyone = list(range(dist.get_world_size()))
            self.group = group_of("checkpoints", everyone, backend="gloo", timeout=PATIENCE)
            self._ranks = ObjectCollectives(self.group)
            self._choice = CheckpointChoice(settings, folder, total_steps, self._ranks)

    def set_model_args(self, model_args: BaseModelArgs) -> None:
        """Replace the model arguments that meta.json and exports contain from now on."""
        self.identity = replace(self.identity, all_args=asdict(model_args))
        if self._adapter is not None:
            self._adapter.model_args = model_args

    def stored_args(self, start: Start, model_args: BaseModelArgs) -> BaseModelArgs | None:
        """Return the model arguments stored with a start; see `args_at_start`.

        model_args: of the run.
        """
        return args_at_start(start, self.identity, model_args, self._adapter)

    def find_start(self) -> Start:
        """Find the checkpoint to begin from. Raises `UserError` where the requested one does not
        exist, or where every checkpoint is damaged."""
        if self._choice is None or self.settings.create_seed_checkpoint:
            return Start()
        if self._ranks.rank == 0 and self.saves:
            clean_up(self.folder)
        return self._choice.find_start()

    # -------------------------------------------------------------- load

    def load(self, state: RunState, start: Start) -> None:
        """Fill the parts of `state` that `start` names. Raises `UserError` for a checkpoint of
        another model, before anything is changed."""
        if start.path is not None:
            self._load_start(state, start, start.path)
        if self._lora is not None and not start.parts - {"model"}:
            self._lora.load(state.model, self._hf_adapter, self.group)

    def _load_start(self, state: RunState, start: Start, path: Path) -> None:
        began = time.perf_counter()
        if start.in_hf:
            quantized = self.settings.initial_load_in_hf_quantized
            load_hf(state.model, self._hf_adapter, path, quantized=quantized, group=self.group)
            parts = start.parts
        else:
            parts = self._load(state, start, path)
        logger.info(
            "Loaded %s of %s in %.2f s: %d steps are done",
            ", ".join(part for part in CHECKPOINT_PARTS if part in parts),
            path,
            time.perf_counter() - began,
            start.step,
        )

    @property
    def _hf_adapter(self) -> StateDictAdapter:
        assert self._adapter is not None, "hf_rules.py refuses Hugging Face's format without one"
        return self._adapter

    def _load(self, state: RunState, start: Start, path: Path) -> set[str]:
        """Load a checkpoint; return the parts that it had."""
        meta = read_json(path, META)
        refuse_other_model(path, meta, self.identity)
        same_layout = meta["layout"] == self.identity.layout
        parts = set(start.parts) - (set() if same_layout else {"rng"})
        refuse_other_adapters(path, meta, self.identity, parts)
        index = read_tensor_index(path)
        if state.average is None or not has_average(index):
            parts.discard("ema")
        tensors = state.tensors(parts)
        stored = stored_tensors(meta, tensors)
        refuse_other_frozen(path, index, stored, self._ranks)
        refuse_other_tensors(path, index, stored, self._ranks)
        try:
            dcp.load(stored, storage_reader=CheckpointReader(path), process_group=self.group)
        except CheckpointException as error:
            why = reason_of_failure(error, path)
            raise UserError(
                f"checkpoint {path} could not be loaded: {why}; take another one."
            ) from None
        state.take_tensors(tensors)
        state.load_numbers(read_json(path, NUMBERS), parts)
        if "rng" in start.parts and not same_layout:
            torch.manual_seed(meta["seed"] + start.step)  # another layout: other random streams
        return parts

    def rewind(self, state: RunState) -> tuple[int, int]:
        """Load the newest complete checkpoint, except the data position and the trainer's counters.

        Returns its step and its tokens seen. Raises `RunError` where no checkpoint exists.
        """
        self._wait()
        if self._choice is None:
            raise RunError("can't rewind without checkpoints; set checkpoint.enable to true.")
        try:
            path = self._choice.newest()
        except UserError as error:
            raise RunError(f"can't rewind: {error}") from None
        if path is None:
            raise RunError(
                f"can't rewind: {self.folder} holds no checkpoint yet; set "
                "checkpoint.enable_first_step_checkpoint, or a shorter checkpoint.interval."
            )
        start = self._choice.start_of(path, set(CHECKPOINT_PARTS))
        kept = frozenset({"model", "ema", "optimizer", "lr_scheduler", "rng"})
        self.load(state, replace(start, parts=start.parts & kept))
        meta = read_json(path, META)
        self.identity = replace(self.identity, all_args=meta["model"]["all_args"])
        return start.step, meta["tokens_seen"]

    # -------------------------------------------------------------- save

    def after_step(self, state: RunState, step: int, *, now: bool = False) -> None:
        """Save if this step is due (or `now`), and log finished saves."""
        self._poll()
        if not self.saves or not (self._is_due(step) or now):
            return
        last = step == self.total_steps
        if last and self.settings.last_save_in_hf:
            self._wait()
            self._export(state, step)
        elif last and self.settings.last_save_model_only:
            self.save(state, step, WEIGHTS, TORCH_DTYPES[self.settings.export_dtype])
        else:
            self.save(state, step)

    def _is_due(self, step: int) -> bool:
        first = step == 1 and self.settings.enable_first_step_checkpoint
        return first or step % self.settings.interval == 0 or step == self.total_steps

    def save(
        self,
        state: RunState,
        step: int,
        content: str = EVERYTHING,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Save now, in the background where `checkpoint.async_mode` says so.

        content: EVERYTHING or WEIGHTS.
        dtype: of the weights, where only weights are saved.
        """
        began = time.perf_counter()
        self._wait()
        tensors = state.weights(dtype) if content == WEIGHTS else state.tensors(state.parts())
        numbers = state.numbers(self.group)
        meta = make_meta(
            self.identity,
            step=step,
            content=content,
            tokens_seen=numbers["train_state"]["tokens_seen"],
            seed=self.seed,
        )
        texts = {
            NUMBERS: json.dumps(numbers, indent=1) + "\n",
            META: json.dumps(meta, indent=2) + "\n",
        }
        writer = CheckpointWriter(self.folder, step, texts, self.settings.keep_latest_k)
        options = {"storage_writer": writer, "process_group": self.group}
        self._failed = None
        if self.settings.async_mode == "disabled":
            try:
                dcp.save(tensors, **options)
            except CheckpointException as error:
                self._log_failure(step, error, writer)
            else:
                self._log_success(step, step_folder(self.folder, step), began)
            return
        response = dcp.async_save(tensors, async_stager=self._get_stager(), **options)
        if isinstance(response, AsyncSaveResponse):
            staged, written = response.staging_completion, response.upload_completion
        else:  # the tensors are already copied
            staged, written = None, response
        self._pending = _Pending(step, began, staged, written, writer)
        logger.info(
            "Checkpoint of step %d is written in the background; training was paused for %.3f s",
            step,
            time.perf_counter() - began,
        )

    def before_update(self) -> None:
        """Wait until a save in the background has copied the weights, which are about to change."""
        if self._pending is not None and self._pending.staged is not None:
            began = time.perf_counter()
            self._pending.staged.result()
            waited = time.perf_counter() - began
            self._pending = replace(self._pending, staged=None)
            logger.info("... and for another %.3f s until its tensors were copied", waited)

    def finish(self) -> None:
        """Wait for the last save. Raises `RunError` if it failed."""
        self._wait()
        if self._failed is None:
            return
        failed, steps = self._ranks.from_rank_0(lambda: (self._failed, self._whole_steps()))
        after = f"step {steps[-1]}, the newest checkpoint" if steps else "the start"
        raise RunError(
            f"the last save of the run failed: {failed}; fix that and run the same command again: "
            f"it resumes from {after}."
        )

    def _whole_steps(self) -> list[int]:
        return [step for step, whole in steps_with_folder(self.folder).items() if whole]

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def _get_stager(self) -> DefaultStager:
        """Return the run's only stager, which keeps the memory of its copies."""
        if self._stager is None:
            self._stager = build_stager(self.settings.async_mode)
        return self._stager

    def _export(self, state: RunState, step: int) -> None:
        self._failed, began = None, time.perf_counter()
        path = self.folder / f"step-{step}-hf"
        dtype = TORCH_DTYPES[self.settings.export_dtype]
        adapter = self._hf_adapter
        try:
            if self._lora is not None:
                self._lora.export(state.model, adapter, path, dtype, self.group)
            else:
                assets = adapter.hf_assets_path
                save_hf(
                    state.model, adapter, path, dtype=dtype, assets_path=assets, group=self.group
                )
        except OSError as error:
            needed = sum(plan_layout(adapter.pieces(), dtype).sizes.values())
            self._failed = f"{path} could not be written: {reason(error, path, needed=needed)}"
            if self._ranks.rank == 0:
                shutil.rmtree(self.folder / f"step-{step}-hf.tmp", ignore_errors=True)
                logger.error("%s", self._failed)
        else:
            self._log_success(step, path, began)

    # -------------------------------------------------------------- saves in progress

    def _poll(self) -> None:
        if self._pending is not None and self._pending.written.done():
            self._wait()

    def _wait(self) -> None:
        """Wait until the save in the background is on disk, or has failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.written.result()
        except CheckpointException as error:
            self._log_failure(pending.step, error, pending.writer)
        else:
            path = step_folder(self.folder, pending.step)
            self._log_success(pending.step, path, pending.started)

    def _log_success(self, step: int, path: Path, began: float) -> None:
        seconds = time.perf_counter() - began
        logger.info("Saved %s in %.3f s", path, seconds)
        self.on_event(step, "checkpoint", path=str(path), seconds=round(seconds, 3))

    def _log_failure(self, step: int, error: CheckpointException, writer: CheckpointWriter) -> None:
        tmp = self.folder / f"step-{step}.tmp"
        why = reason_of_failure(error, tmp, writer.needed)
        self._failed = f"the checkpoint of step {step} could not be written to {self.folder}: {why}"
        self.on_event(step, "checkpoint_failed", why=why)
        if self._ranks.rank == 0:
            # The files of this save may be what fills the disk.
            shutil.rmtree(tmp, ignore_errors=True)
            logger.error(
                "%s; older checkpoints are unchanged, and the next save is due at the next "
                "multiple of checkpoint.interval (%d)",
                self._failed,
                self.settings.interval,
            )
