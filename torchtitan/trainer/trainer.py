"""The training run in three levels: train → train_step → forward_backward.

The loss of a step is the sum over its tokens, divided once by the number of its valid tokens over
all ranks and micro-batches; gradients are sums too. So the layout of a run never changes its
numbers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import torchtitan
from torchtitan.components.checkpoint.meta import WEIGHTS
from torchtitan.components.metrics.alarms import Action
from torchtitan.components.metrics.logger import device_name
from torchtitan.components.optimizer import prepare_step
from torchtitan.components.optimizer.lr_scheduler import resume_lr_scheduler
from torchtitan.data.dataloader import merge_states
from torchtitan.distributed.fsdp import sync_replicas_on_last_microbatch
from torchtitan.distributed.utils import (
    gather_from_ranks,
    set_timeout,
    sum_over_ranks,
)
from torchtitan.models.moe.balancing import step_loads, update_expert_bias
from torchtitan.report import report_at_end
from torchtitan.tools.errors import RunError
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import to_device
from torchtitan.trainer.build import (
    profilers,
)
from torchtitan.trainer.built_run import BuiltRun
from torchtitan.trainer.forward_backward import Batch, StepCounts
from torchtitan.trainer.step_log import Interval, Outcome, StepBar, StepResult


class Trainer(BuiltRun):
    """One run from its config. Use `train`, then `close`.

    Raises `UserError` for mistakes of the user, `RunError` when training itself fails.
    """

    def train(self) -> None:
        """Run all steps, with their log lines; then write the report, also of a run that fails."""
        self.metrics.event(self.step, "start", **self._start_facts())
        try:
            how = self._run_steps()
        except RunError as error:
            self._end(f"failed: {error}")
            raise
        self._end(how)
        next_step = "; nothing is saved without checkpoint.enable"
        if self.checkpoint.saves:
            ended = self.step < self.config.training.steps
            next_step = "; the same command goes on from there" if ended else ""
        logger.info("Training %s after step %d%s", how, self.step, next_step)

    def _run_steps(self) -> str:
        """Run all steps. Returns how the run ended."""
        config, steps = self.config, self.config.training.steps
        first = self.phases.schedule.at(self.tokens_seen)
        logger.info(
            "Training: %d steps of %d sequences of %d tokens",
            steps,
            first.batch_size,
            first.seq_len,
        )
        self.routing_watch.begin(self.model, self.step, is_first=self.rank == 0)
        batches, interval = iter(self.dataloader), Interval()
        bar = StepBar(steps, self.step, self.tokens_seen)
        with self._profilers() as profile_step, self.stop, closing(bar):
            self.stop.begin_steps(saves=self.checkpoint.saves)
            stopping = self._was_asked_to_stop()
            while self.step < steps and not stopping:
                self.step += 1
                self.gc.run(self.step)
                start = time.perf_counter()
                with self.waiting.around(self.step):
                    result = self.train_step(batches, interval)
                interval.step_seconds.append(time.perf_counter() - start)
                self.stop.agree(result.asked_by)
                stopping = result.asked_by != 0
                alarm: Action = "none"
                validation = self._validate()
                if self.metrics.should_log(self.step) or validation or stopping:
                    alarm = self._log(result, interval, validation)
                    interval = Interval()
                rewound = result.verdict == "rewind"
                if rewound:
                    self._rewind()
                # A rewind is saved at once: a restart must not read the same batch again.
                save_now = stopping or rewound or alarm in ("checkpoint", "stop")
                self.checkpoint.after_step(self.run_state, self.step, now=save_now)
                if alarm == "stop":
                    self.checkpoint.finish()
                    raise RunError(f"{self.step_log.alarms.reason}, and its action is to stop.")
                bar.show(self.step, result.loss, self.tokens_seen)
                profile_step()
                if self.warming_up:
                    set_timeout(config.comm.train_timeout_seconds, self.checkpoint.group)
                    self.warming_up = False
            self.stop.end_steps()
            self.checkpoint.finish()
        return self._how_it_ended()

    def _profilers(self) -> AbstractContextManager[Callable[[], None]]:
        return profilers(
            self.config,
            self.rank,
            self.step,
            asked=self.stop.take_trace_request,
            waiting_freq=self.waiting.freq,
        )

    def _how_it_ended(self) -> str:
        steps = self.config.training.steps
        if self.step < steps and self.stop.number:
            return f"was ended by {Signals(self.stop.number).name} short of {steps} steps,"
        return "finished" if self.step >= steps else f"stopped short of {steps} steps,"

    def _start_facts(self) -> dict[str, Any]:
        """Facts of this start, for the report."""
        experts = f", EP {self.dims.ep}" if self.dims.ep > 1 else ""
        return {
            "steps": self.config.training.steps,
            "devices": dist.get_world_size(),
            "device": device_name(self.device),
            "layout": self.dims.describe() + experts,
            "torch": torch.__version__,
            "version": torchtitan.__version__,
            "settings_file": self.config.job.save_config_file,
        }

    def _end(self, how: str) -> None:
        """Record the end, and write the report on rank 0."""
        self.metrics.event(self.step, "end", how=how.rstrip(","))
        if self.rank == 0 and self.config.metrics.enable_report:
            report_at_end(self.config.job.dump_folder)

    def train_step(self, batches: Iterator[Batch], interval: Interval) -> StepResult:
        """Run one optimizer step over `accumulation` micro-batches."""
        self._enter_step()
        micro_batches = self._next_batches(batches, interval)
        local = torch.stack([self.passes.count(batch) for batch in micro_batches]).sum(dim=0)
        in_step = sum_over_ranks(to_device(local, self.device), self.dims.dp_group).clamp(min=1)
        counts = StepCounts(*in_step.unbind())

        if self.config.optimizer.early_step_in_backward:
            self._before_update()
        outcome = self._share(*self._run_passes(micro_batches, counts), counts)
        if outcome.overflow > 0:
            outcome = self._redo(micro_batches, counts, outcome.overflow)
        return self._update(outcome)

    def _run_passes(
        self, micro_batches: list[Batch], counts: StepCounts, *, may_replay: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Fill the gradients. Returns this rank's part of the loss, and the gradient norm."""
        if self.graphed is not None and may_replay:
            return self.graphed(micro_batches, counts.labels)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            sync_replicas_on_last_microbatch(self.model, is_last=is_last)
            if self.compute_weights is not None:
                self.compute_weights.sums_replicas = is_last
            loss += self.forward_backward(batch, counts)
        return loss, self._clip()

    def _redo(self, micro_batches: list[Batch], counts: StepCounts, needed: float) -> Outcome:
        """Run the passes again with exact sizes: experts got more rows than they had room for, so
        that gradients lack some. Nothing else has seen them yet."""
        capacity = self.capacity
        assert capacity is not None, "only gathered tokens overflow"
        logger.warning(
            "Step %d: a rank's experts got %.2f times the mean number of rows, but have room for "
            "%.2f; the step is done again with exact sizes, and the room grows",
            self.step,
            needed,
            capacity.factor,
        )
        self.model.take_side_losses()  # drops them
        if self.graphed is not None:
            self.graphed.forget()
        capacity.exact = True
        try:
            passed = self._run_passes(micro_batches, counts, may_replay=False)
        finally:
            capacity.exact = False
        capacity.grow(needed)
        return self._share(*passed, counts)

    def forward_backward(self, batch: Batch, counts: StepCounts) -> Tensor:
        """Add to the gradients; return this micro-batch's part of the step's loss."""
        return self.passes.forward_backward(batch, counts)

    # -------------------------------------------------------------- checkpoints

    def save_seed(self) -> None:
        """Save the initial weights as step 0, from which any layout can start."""
        self.checkpoint.save(self.run_state, 0, WEIGHTS)
        self.checkpoint.finish()

    def _rewind(self) -> None:
        """Load the last checkpoint; the data continues after the batch that was just read."""
        self.optimizer.zero_grad()
        context = self.checkpoint.identity.all_args
        to_step, tokens_seen = self.checkpoint.rewind(self.run_state)
        if self.checkpoint.identity.all_args != context:
            self.phases.forget_context()
        self.loss_guard.count_rewind(self.step, to_step)
        self.step, self.progress.tokens_seen = to_step, tokens_seen
        self.metrics.rewind(to_step)
        if self.average is not None:
            self.average.enter(self.step)

    def _was_asked_to_stop(self) -> bool:
        """Tell whether a signal has asked any rank to stop before its first step."""
        asked = torch.tensor(float(self.stop.number), device=self.device)
        all_asked = torch.stack(gather_from_ranks(asked))
        self.stop.agree(int(all_asked.max()))  # host sync: once, at start
        return self.stop.number != 0

    # -------------------------------------------------------------- parts of a step

    def _enter_step(self) -> None:
        """Apply the schedule's settings of this step to model, data and learning rate."""
        change = self.phases.enter(self.tokens_seen)
        self._warn(change.warnings)
        if change.batch_shape:
            self._change_sequences()
        now = self.phases.now
        if not now.phase:
            return
        if change.phase:
            logger.info("Step %d: in phase %s: %s", self.step, now.title, now.describe())
            self.metrics.event(self.step, "phase", title=now.title, settings=now.describe())
        resume_lr_scheduler(self.lr_scheduler, self.lr_scheduler.last_epoch)  # also after a rewind
        self.model.set_coefficients(now.coefficients)

    def _change_sequences(self) -> None:
        """Rebuild all parts that depend on the sequences' length, number or YaRN, as a run that
        begins at this step would build them."""
        now = self.phases.now
        self.model.set_context(self.model_args)
        self.checkpoint.set_model_args(self.model_args)
        positions: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(positions, self.dataloader.local_state())
        state = merge_states(positions)
        self.dataloader.resize(state, batch_size=now.local_batch_size, seq_len=now.seq_len)
        if self.passes.pipeline is not None:
            self.passes.pipeline.forget_schedules()
        # Otherwise the compiler would take the second length as a sign that lengths vary, and
        # compile for any length, which is slower.
        torch.compiler.reset()
        set_timeout(self.config.comm.init_timeout_seconds, except_for=self.checkpoint.group)
        self.warming_up = True

    def _next_batches(self, batches: Iterator[Batch], interval: Interval) -> list[Batch]:
        start = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.accumulation)]
        interval.data_seconds += time.perf_counter() - start
        tokens = sum(labels.numel() for _, labels in micro_batches) * self.dims.dp_degree
        interval.tokens += tokens
        interval.flops += tokens * self.model_args.train_flops_per_token(self.phases.now.seq_len)
        self.progress.tokens_seen += tokens
        return micro_batches

    def _share(self, local_loss: Tensor, grad_norm: Tensor, counts: StepCounts) -> Outcome:
        """Tell all ranks what the passes came to."""
        moes = list(self.moes.values())
        load = step_loads(moes, self.dims.stage_group) if moes else None
        overflow = torch.zeros_like(local_loss)
        if load is not None and load.overflow is not None:
            overflow = load.overflow
        # A request to stop is sent with the loss, so that all ranks end after the same step.
        asked = torch.full_like(local_loss, float(self.stop.number))
        gathered = torch.cat(gather_from_ranks(torch.stack((local_loss, asked, overflow))))
        prepare_step(self.optimizer)
        # host sync: a non-finite step must be known before the weights change
        # fp64: fp32 counts to 2**24 only
        last = torch.stack([each.double() for each in (*counts, grad_norm)])
        *sent, labels, tokens, weight, norm = torch.cat((gathered.double(), last)).tolist()
        losses, asked_by, overflows = sent[::3], sent[1::3], sent[2::3]
        return Outcome(
            load=load,
            rank_losses=[losses[rank] for rank in self.dims.loss_ranks],
            grad_norm=norm,
            labels=labels,
            tokens=tokens,
            weight=weight,
            asked_by=int(max(asked_by)),
            overflow=max(overflows),
        )

    def _update(self, outcome: Outcome) -> StepResult:
        """Update weights and expert bias together, or (in a bad step) neither of them."""
        load, rank_losses = outcome.load, outcome.rank_losses
        verdict = self.loss_guard.judge(self.step, rank_losses, outcome.grad_norm)
        if verdict != "update":
            self.metrics.event(self.step, verdict, loss=sum(rank_losses))
        if verdict == "update":
            self._before_update()
            self.optimizer.step()
            if load is not None:
                update_expert_bias(list(self.moes.values()), load.tokens_E)
        if self.average is not None and verdict != "rewind":
            self.average.after_step(self.step)
        side = self.model.take_side_losses()
        side = {name: sum_over_ranks(self._counted_once(x)) for name, x in side.items()}
        lr = self.lr_scheduler.get_last_lr()[0]
        if verdict != "rewind":
            self.lr_scheduler.step()
        return StepResult(
            loss=sum(rank_losses),
            max_loss=max(rank_losses) * len(rank_losses),
            grad_norm=outcome.grad_norm,
            lr=float(lr),
            loads=self._by_layer(load and load.tokens_E),
            traffic=self._by_layer(load and load.traffic),
            router_stats=self._by_layer(load and load.stats),
            side_losses={name: x.item() / outcome.weight for name, x in side.items()},
            labels=int(outcome.labels),
            tokens=int(outcome.tokens),
            verdict=verdict,
            asked_by=outcome.asked_by,
        )

    def _by_layer(self, rows: Tensor | None) -> dict[int, Tensor]:
        return {} if rows is None else dict(zip(self.moes, rows, strict=True))

    def _before_update(self) -> None:
        """Finish copies of the weights (checkpoint, average) before they change."""
        self.checkpoint.before_update()
        if self.average is not None:
            self.average.before_update()

    def _validate(self) -> dict[str, Any]:
        """Validate, and measure how far routing has moved, where that is due after this step.

        Returns their numbers, none where nothing is due.
        """
        last_step, validator = self.config.training.steps, self.validator
        moved = self.routing_watch.numbers(self.model, self.step, last_step)
        if validator is None or not validator.is_due(self.step, last_step):
            return moved
        numbers = moved | validator.run(self.model, self.step)
        self.metrics.log_texts(validator.samples(self.model, self.step), self.step)
        return numbers

    def _log(self, result: StepResult, interval: Interval, validation: dict[str, Any]) -> Action:
        return self.step_log.log(
            result,
            interval,
            progress=self.progress,
            now=self.phases.now,
            model_args=self.model_args,
            more=self.waiting.take_numbers() | validation,
        )
