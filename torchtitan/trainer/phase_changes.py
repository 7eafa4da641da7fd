"""Changes that the schedule's phases bring between two steps, and the model arguments they lead to.

This file only decides; the trainer applies the changes.
"""

from typing import Any, NamedTuple

from torchtitan.config import JobConfig
from torchtitan.config.phases import BatchShape, RunSchedule, StepSettings
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.trainer.preflight import model_args_of


class Change(NamedTuple):
    """Changes at the beginning of a step.

    phase: the step is the first of a phase that this process trains in.
    batch_shape: the sequences' length, their number in a forward pass, or YaRN, is new.
    warnings: sentences about changes in how positions are encoded.
    """

    phase: bool
    batch_shape: bool
    warnings: list[str]


class Phases:
    """The schedule's settings at the current step.

    now: settings; before the first step, those at the run's beginning.
    model_args: of the model, for the current sequences.
    """

    def __init__(
        self, config: JobConfig, spec: TrainSpec, model_args: BaseModelArgs, schedule: RunSchedule
    ):
        self.schedule = schedule
        self.model_args = model_args
        self.now: StepSettings = schedule.ends[0]
        self._config, self._spec = config, spec
        # The shape for which model and loader are set up; None: they must be set up again.
        self._batch_shape: BatchShape | None = self.now.batch_shape
        # Model arguments that are kept from the loaded weights.
        self._kept: dict[str, Any] = {}
        # Arguments of the weights as they were trained last, if they were.
        self._trained_as: BaseModelArgs | None = None

    def keep_context(
        self, stored: BaseModelArgs | None, tokens_seen: int, *, in_hf: bool
    ) -> list[str]:
        """Keep the encoding of positions of the weights to be loaded, where only this run's lengths
        would change it. Returns sentences about it, for the log.

        stored: arguments of those weights; None = none are loaded.
        tokens_seen: of the run that is resumed.
        in_hf: the weights are in Hugging Face's format; there the two config.json are compared
            when weights are loaded.
        """
        self._trained_as = stored
        if stored is None:
            return []
        # A phase of this run may have changed it already: then it stays changed.
        begun = [self._args_of(each) for each in self.schedule.begun(tokens_seen)]
        options = [args.keep_from(stored) for args in begun]
        self._kept, notes = min(options, key=lambda option: len(option[1]))
        if not in_hf:
            now = self._args_of(self.schedule.at(tokens_seen))
            notes = notes + now.context_changes(stored)
        self.model_args = self._args_of(self.schedule.ends[0])
        return notes

    def enter(self, tokens_seen: int) -> Change:
        """Take the settings of the step that begins after `tokens_seen` tokens."""
        before, self.now = self.now, self.schedule.at(tokens_seen)
        warnings: list[str] = []
        resized = self.now.batch_shape != self._batch_shape
        if resized:
            self._batch_shape = self.now.batch_shape
            if self._trained_as is not None:
                longest = max(each.seq_len for each in self.schedule.begun(tokens_seen))
                self._kept["context_len"] = max(self.model_args.context_len or 0, longest)
            self.model_args = self._args_of(self.now)
            if self._trained_as is not None:
                warnings = self.model_args.context_changes(self._trained_as)
        self._trained_as = self.model_args
        return Change(bool(self.now.phase) and self.now.phase != before.phase, resized, warnings)

    def forget_context(self) -> None:
        """Let the next step set up its sequences again, because other weights have been loaded."""
        self._batch_shape = self._trained_as = None

    def _args_of(self, now: StepSettings) -> BaseModelArgs:
        return model_args_of(self._config, self._spec, now.seq_len, now.yarn, self._kept)
