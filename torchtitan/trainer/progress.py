"""Progress of a run: the counters that a checkpoint keeps."""

from collections.abc import Mapping
from typing import Any

import torch

from torchtitan.components.checkpoint.batch_change import warn_of_other_batch
from torchtitan.components.metrics.loss_guard import LossGuard
from torchtitan.components.validate import Validator
from torchtitan.config.phases import RunSchedule
from torchtitan.data.identity import tell_other_validation_data
from torchtitan.distributed.pipeline_parallel import Pipeline
from torchtitan.protocols.layers import MoELayer


class Progress:
    """Steps and tokens done, and other counters of a run; values of JSON, the same on all ranks.

    moes: layers of this rank, by number; their loads of the last step are included.
    """

    def __init__(
        self,
        *,
        schedule: RunSchedule,
        loss_guard: LossGuard,
        moes: Mapping[int, MoELayer],
        pipeline: Pipeline | None,
        validator: Validator | None,
        dp_degree: int,
    ) -> None:
        self.step = self.tokens_seen = 0
        self._schedule, self._loss_guard, self._dp_degree = schedule, loss_guard, dp_degree
        self._moes, self._pipeline, self._validator = moes, pipeline, validator

    def state_dict(self) -> dict[str, Any]:
        """Collect the counters, ready for JSON; every rank must call this."""
        loads = {layer: moe.global_tokens_per_expert for layer, moe in self._moes.items()}
        if self._pipeline is not None:  # of the layers on all stages
            (loads,) = self._pipeline.gather((loads,))
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "loss_watch": self._loss_guard.state_dict(),
            "expert_loads": {str(i): load.tolist() for i, load in loads.items()},
            "batch_size": self._schedule.at(self.tokens_seen).batch_size,
            "validation_data": self._validator.data_identity if self._validator else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the counters of a checkpoint; log differences between this run and that one."""
        self.step = state["step"]
        self.tokens_seen = state["tokens_seen"]
        self._loss_guard.load_state_dict(state["loss_watch"])
        loads = state.get("expert_loads", {})  # not in checkpoints of earlier versions
        for layer, moe in self._moes.items():
            load_E = moe.global_tokens_per_expert
            load_E.copy_(torch.tensor(loads.get(str(layer), [0] * load_E.numel())))
        now = self._schedule.at(self.tokens_seen)
        warn_of_other_batch(
            state.get("batch_size", now.batch_size),  # earlier versions didn't save it
            now.batch_size,
            local_batch_size=now.local_batch_size,
            dp_degree=self._dp_degree,
            in_phase=now.phase > 0,
        )
        saved = state.get("validation_data")
        if saved and self._validator:
            tell_other_validation_data(saved, self._validator.data_identity)
