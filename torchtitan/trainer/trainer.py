"""The training run: what it is built from, and its three levels: train → train_step →
forward_backward.

The loss of a step is the sum over its tokens, divided once by the number of its valid tokens over
all ranks and micro-batches; gradients are sums too. So the layout of a run never changes its
numbers.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.components.checkpoint import build_checkpoint_manager
from torchtitan.components.checkpoint.batch_change import tell_other_batch
from torchtitan.components.checkpoint.meta import WEIGHTS
from torchtitan.components.checkpoint.resume import Start
from torchtitan.components.checkpoint.run_state import RunState
from torchtitan.components.cuda_graph import GraphedPass
from torchtitan.components.dump_folder import alone_in_folders, save_config
from torchtitan.components.metrics.alarms import Action, Alarms
from torchtitan.components.metrics.expert_load import Numbers, violation_numbers
from torchtitan.components.metrics.expert_traffic import traffic_line
from torchtitan.components.metrics.loss_guard import LossWatch
from torchtitan.components.optimizer import build_optimizer, group_rules
from torchtitan.components.optimizer.compute_weights import build_compute_weights
from torchtitan.components.optimizer.ema import WeightAverage
from torchtitan.components.optimizer.fused_adam import FusedAdam
from torchtitan.components.optimizer.lr_scheduler import resume_lr_scheduler
from torchtitan.components.validate import Validator
from torchtitan.config import JobConfig, run_schedule
from torchtitan.config.dry_run import without_checkpoints
from torchtitan.config.phases import Now, Sequences, largest_coefficients
from torchtitan.data import build_training_dataloader, data_numbers
from torchtitan.data.dataloader import merge_states
from torchtitan.data.identity import tell_other_validation_data
from torchtitan.data.validation import build_validation_dataloader
from torchtitan.distributed.agreement import Settings
from torchtitan.distributed.fsdp import sync_replicas_on_last_microbatch
from torchtitan.distributed.grad_norm import clip_factor, clip_grad_norm
from torchtitan.distributed.pipeline_parallel import StepInputs
from torchtitan.distributed.pipeline_plan import PipelinePlan
from torchtitan.distributed.utils import (
    gather_from_ranks,
    init_distributed,
    meeting_of_ranks,
    set_determinism,
    set_timeout,
    sum_over_ranks,
)
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.moe.balancing import step_loads, update_expert_bias
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.tools.cpu import bound_onednn_cache, lacks_bf16
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.gc import GarbageCollection
from torchtitan.tools.logging import logger
from torchtitan.tools.signals import StopRequest
from torchtitan.tools.utils import TORCH_DTYPES, local_device
from torchtitan.trainer.build import (
    build_lr_scheduler,
    build_metrics,
    build_model,
    build_parallel_dims,
    build_schedule,
    profilers,
)
from torchtitan.trainer.forward_backward import Batch, ForwardBackward
from torchtitan.trainer.preflight import Checked, check_config, model_args_of, pipeline_plan
from torchtitan.trainer.same_run import identity_of_start, settings_of_run
from torchtitan.trainer.step_log import Interval, StepResult, balance_of, traffic_of


class Trainer:
    """One run from its config. Use `train`, then `close`.

    Raises `UserError` for what the user can mend, `RunError` when training itself has failed.
    """

    def __init__(
        self,
        config: JobConfig,
        checked: Checked | None = None,
        stop: StopRequest | None = None,
    ):
        """checked: what `check_config(config)` returned, where it has been called already.
        stop: where signals are heard already."""
        self.config = config = without_checkpoints(config)
        self.stop = stop or StopRequest()
        self.spec, self.model_args, self.tokenizer = checked or check_config(config)
        self._open = ExitStack()
        try:
            self._build()
        except BaseException as error:
            # An unexpected error is this rank's alone, and closing would wait for the others.
            alone = not dist.is_initialized() or dist.get_world_size() == 1
            if alone or isinstance(error, UserError | RunError):
                self._open.close()
            raise

    def _build(self) -> None:
        """In an order that matters: groups, then data and model, then what updates the model, then
        what watches the run; last of all the state of an earlier run."""
        plan = self._join_ranks()
        config = self.config
        layout = asdict(self.dims)
        self.checkpoint = build_checkpoint_manager(config, self.spec, self.model_args, layout)
        self._open.callback(self.checkpoint.close)
        start = self.checkpoint.find_start()
        self._keep_context(start)
        seed = self.checkpoint.seed = set_determinism(config.debug, self.device, start.seed)
        ranks = {"dp_rank": self.dims.dp_rank(self.rank), "dp_degree": self.dims.dp_degree}
        meeting_of_ranks(config.comm).agree(lambda: self._open_data(start, seed, ranks))
        parts = self._build_model(plan)
        self._build_updates()
        self.passes = ForwardBackward(
            config,
            self.model,
            self.dims,
            self.device,
            eos_id=self.tokenizer.eos_id,
            parts=parts,
            plan=plan,
        )
        self._build_watchers(start.step)
        self.run_state = RunState(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.dataloader,
            progress=self,
            average=self.average,
        )
        self.validator = None
        if config.validation.enable:
            self.validator = Validator(
                config.validation, self.validation_data, self.loss_sum, device=self.device
            )
        self.checkpoint.load(self.run_state, start)
        if self.average is not None:
            self.average.enter(self.step)

    def _join_ranks(self) -> PipelinePlan | None:
        """The process groups, and what each rank is in them."""
        config = self.config
        self.device = local_device()
        if self.device.type == "cpu":
            bound_onednn_cache()
        leave = init_distributed(
            config.comm, self.device, config.job.dump_folder, self._take_folders
        )
        self._open.callback(leave)
        self.rank = dist.get_rank()
        logger.info("%s", config.job.description)
        if self.rank == 0:
            save_config(config, self.model_args)
            self._warn_of_slow_dtype()
        plan = pipeline_plan(config, self.model_args)
        self.dims = build_parallel_dims(config, plan)
        return plan

    def _warn_of_slow_dtype(self) -> None:
        computes_in = self.config.training.mixed_precision_param
        if self.device.type == "cpu" and computes_in == "bfloat16" and lacks_bf16():
            logger.warning(
                'training.mixed_precision_param = "bfloat16" is emulated by this CPU and up to 14 '
                'times slower than "float32"; set it to "float32".'
            )

    def _take_folders(self, rank: int) -> Settings:
        """Take them for all ranks, if this is rank 0. Returns what must be the same on all."""
        if rank == 0:
            self._open.enter_context(alone_in_folders(self.config))
        return settings_of_run(self.config, (self.spec, self.model_args, self.tokenizer))

    def _open_data(self, start: Start, seed: int, ranks: dict[str, int]) -> Settings:
        """Returns what must be the same on all ranks: the data, and what the run begins from."""
        config = self.config
        self.dataloader = build_training_dataloader(config, self.tokenizer, seed=seed, **ranks)
        found = self.dataloader.identity() | identity_of_start(start.path)
        if config.validation.enable:
            data = build_validation_dataloader(config.validation, self.tokenizer, **ranks)
            self.validation_data = data
            found |= {f"validation: {name}": value for name, value in data.identity().items()}
        return found

    def _keep_context(self, start: Start) -> None:
        """Positions stay encoded as the weights that are about to be loaded have it, where only the
        lengths of this run would change it."""
        self.kept: dict[str, Any] = {}
        self.trained_as = self.checkpoint.stored_args(start, self.model_args)
        if self.trained_as is None:
            return
        schedule = run_schedule(self.config, self.dims.dp_degree)
        # A phase of this run may have changed it already: then this run goes on as it was.
        begun = [self._args_of(each) for each in schedule.begun(start.tokens_seen)]
        options = [args.keep_from(self.trained_as) for args in begun]
        self.kept, told = min(options, key=lambda option: len(option[1]))
        if not start.in_hf:  # there the two config.json are compared when weights are loaded
            now = self._args_of(schedule.at(start.tokens_seen))
            told = told + now.context_changes(self.trained_as)
        self._tell(told)
        self.model_args = self._args_of(schedule.ends[0])
        self.checkpoint.set_model_args(self.model_args)
        if self.rank == 0:
            save_config(self.config, self.model_args)

    def _args_of(self, now: Now) -> BaseModelArgs:
        return model_args_of(self.config, self.spec, now.seq_len, now.yarn, self.kept)

    def _tell(self, sentences: list[str]) -> None:
        for sentence in sentences if self.rank == 0 else []:
            logger.warning("%s", sentence)

    def _build_model(self, plan: PipelinePlan | None) -> list[BaseModel]:
        """Returns its parts by stage, with a pipeline."""
        config, dims = self.config, self.dims
        self.model, parts = build_model(self.spec, self.model_args, dims, config, self.device, plan)
        # also of the groups that are new now
        set_timeout(config.comm.init_timeout_seconds, except_for=self.checkpoint.group)
        self.moes = self.model.moe_layers()
        for moe in self.moes.values():
            moe.watch_routing = config.metrics.log_routing
        if self.rank == 0:
            largest = largest_coefficients(config.schedule.phase)
            for sentence in self.model_args.without_effect(config.model.args, largest):
                logger.warning("%s", sentence)
        return parts

    def _build_updates(self) -> None:
        """What changes the weights: schedule, optimizer, learning rate, average."""
        config = self.config
        self.step = self.tokens_seen = 0
        self.schedule = build_schedule(config, self.dims.dp_degree)
        self.now = self.schedule.ends[0]  # until the first step
        self.sequences: Sequences | None = self.now.sequences  # what all is set up for
        self.working = build_compute_weights(
            self.model,
            config,
            self.dims,
            # A batch that grows takes several micro-batches sooner or later.
            several_passes=self.accumulation > 1 or bool(self.schedule.phases),
        )
        self.graphed = GraphedPass(self._pass_and_clip) if config.compile.cuda_graph else None
        with torch.device("meta"):  # the whole model, also where this rank has a stage of it
            group_rules(config.optimizer).log(self.spec.model_cls(self.model_args))
        self.optimizer = build_optimizer(
            [self.model], working=self.working, **vars(config.optimizer)
        )
        if self.working is not None and not isinstance(self.optimizer, FusedAdam):
            outdate = self.working.outdate
            self.optimizer.register_step_post_hook(lambda *_: outdate())
        self.average = WeightAverage(self.model, config.ema) if config.ema.enable else None
        if self.average is not None:
            self._open.callback(self.average.close)
        self.lr_scheduler = build_lr_scheduler(
            config, self.optimizer, self.schedule, lambda: self.tokens_seen
        )

    def _build_watchers(self, start_step: int) -> None:
        config, training = self.config, self.config.training
        self.metrics = build_metrics(config, self.device, start_step)
        self._open.callback(self.metrics.close)
        self.gc = GarbageCollection(training.gc_freq, training.gc_debug)
        self._open.callback(self.gc.close)
        self.watch = LossWatch(
            training,
            self.dims.loss_ranks,
            early_step=config.optimizer.early_step_in_backward,
        )
        self.alarms = Alarms(config.metrics.alarm)
        self.warming_up = True  # the next step may compile

    def train(self) -> None:
        """All steps, with their log lines."""
        config, steps = self.config, self.config.training.steps
        first = self.schedule.at(self.tokens_seen)
        logger.info(
            "Training: %d steps of %d sequences of %d tokens",
            steps,
            first.batch_size,
            first.seq_len,
        )
        batches, interval = iter(self.dataloader), Interval()
        with profilers(config, self.rank, self.step) as profile_step, self.stop:
            self.stop.begin_steps(saves=self.checkpoint.saves)
            stopping = self._was_asked_to_stop()
            while self.step < steps and not stopping:
                self.step += 1
                self.gc.run(self.step)
                start = time.perf_counter()
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
                # A rewind is saved at once: a restart must not meet the same batch again.
                save_now = stopping or rewound or alarm in ("checkpoint", "stop")
                self.checkpoint.after_step(self.run_state, self.step, now=save_now)
                if alarm == "stop":
                    self.checkpoint.finish()
                    raise RunError(f"{self.alarms.reason}, and its action is to stop.")
                profile_step()
                if self.warming_up:
                    set_timeout(config.comm.train_timeout_seconds, self.checkpoint.group)
                    self.warming_up = False
            self.stop.end_steps()
            self.checkpoint.finish()
        how = "finished" if self.step >= steps else f"stopped short of {steps} steps,"
        if self.step < steps and self.stop.number:
            how = f"was ended by {Signals(self.stop.number).name} short of {steps} steps,"
        logger.info("Training %s after step %d", how, self.step)

    def train_step(self, batches: Iterator[Batch], interval: Interval) -> StepResult:
        """One optimizer step over `accumulation` micro-batches."""
        self._enter_step()
        micro_batches = self._next_batches(batches, interval)
        valid = torch.stack([(labels != IGNORE_INDEX).sum() for _, labels in micro_batches]).sum()
        valid_tokens = sum_over_ranks(valid.to(self.device), self.dims.dp_group).clamp(min=1)

        if self.config.optimizer.early_step_in_backward:
            self._before_update()
        if self.graphed is not None:
            self.model.set_tokens_in_step(valid_tokens)
            loss, norm = self._graphed_pass(self.graphed, micro_batches[0], valid_tokens)
            return self._update(loss, norm, valid_tokens)
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            sync_replicas_on_last_microbatch(self.model, is_last=is_last)
            loss += self.forward_backward(batch, valid_tokens)
        return self._update(loss, self._clip(), valid_tokens)

    def _clip(self) -> Tensor:
        """Clip the gradients, now or when the optimizer reads them; their norm before."""
        optimizer, max_norm = self.optimizer, self.config.training.max_norm
        if not isinstance(optimizer, FusedAdam):
            return clip_grad_norm(self.model.parameters(), max_norm)
        if optimizer.early_step:
            return optimizer.early_grad_norm()
        grad_norm, optimizer.grad_factor = clip_factor(self.model.parameters(), max_norm)
        return grad_norm

    def forward_backward(self, batch: Batch, valid_tokens: Tensor) -> Tensor:
        """This micro-batch's part of the step's loss; adds to the parameters' gradients."""
        return self.passes.forward_backward(batch, valid_tokens)

    def loss_sum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Over a batch's valid labels, and how many these are: adds up over all ranks."""
        loss, count = self.passes.loss_sum(batch)
        return self._counted_once(loss), self._counted_once(count)

    def _counted_once(self, of_tokens: Tensor) -> Tensor:
        """Zero on ranks that only repeat another's (tensor parallelism, earlier stages)."""
        return of_tokens if self.rank in self.dims.loss_ranks else torch.zeros_like(of_tokens)

    def _graphed_pass(
        self, graphed: GraphedPass, batch: Batch, valid_tokens: Tensor
    ) -> tuple[Tensor, ...]:
        """Loss and gradient norm of a step whose kernels are replayed."""
        inputs = self.passes.inputs(batch)
        if self.passes.masks(batch[0]["input"]) is not None:
            raise UserError(
                "compile.cuda_graph = true needs the same kernels in every step, but the documents "
                "of model.args.attn_mask_type 'block_causal' change; set either to its default."
            )
        if self.working is not None:
            self.working.refresh()
        if not graphed.holds_grads:
            self.optimizer.zero_grad()
        loss_and_norm = graphed(inputs.tokens, inputs.labels, valid_tokens)
        if isinstance(self.optimizer, FusedAdam):
            self.optimizer.as_graph = graphed.holds_grads
        return loss_and_norm

    def _pass_and_clip(
        self, tokens: Tensor, labels: Tensor, valid_tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = StepInputs(tokens, labels, tokens, None, labels != IGNORE_INDEX, {})
        return self.passes.backward(inputs, None, valid_tokens), self._clip()

    def close(self) -> None:
        """Release files and process groups; safe to call twice."""
        self._open.close()

    # -------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The counters that a checkpoint keeps, JSON only, the same on all ranks; all call it."""
        loads = {layer: moe.global_tokens_per_expert for layer, moe in self.moes.items()}
        if self.passes.pipeline is not None:  # of the layers on all stages
            (loads,) = self.passes.pipeline.gather((loads,))
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "loss_watch": self.watch.state_dict(),
            "expert_loads": {str(i): load.tolist() for i, load in loads.items()},
            "batch_size": self.schedule.at(self.tokens_seen).batch_size,
            "validation_data": self.validator.data_identity if self.validator else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.tokens_seen = state["tokens_seen"]
        self.watch.load_state_dict(state["loss_watch"])
        loads = state.get("expert_loads", {})  # not in checkpoints of earlier versions
        for layer, moe in self.moes.items():
            load_E = moe.global_tokens_per_expert
            load_E.copy_(torch.tensor(loads.get(str(layer), [0] * load_E.numel())))
        now = self.schedule.at(self.tokens_seen)
        tell_other_batch(
            state.get("batch_size", now.batch_size),  # earlier versions didn't save it
            now.batch_size,
            local_batch_size=now.local_batch_size,
            dp_degree=self.dims.dp_degree,
            in_phase=now.phase > 0,
        )
        saved = state.get("validation_data")
        if saved and self.validator:
            tell_other_validation_data(saved, self.validator.data_identity)

    def save_seed(self) -> None:
        """The weights as they were initialised, as step 0: any layout can begin from them."""
        self.checkpoint.save(self.run_state, 0, WEIGHTS)
        self.checkpoint.finish()

    def _rewind(self) -> None:
        """Back to the last checkpoint; the data goes on after the batch that was just read."""
        self.optimizer.zero_grad()
        context = self.checkpoint.identity.all_args
        to_step, tokens_seen = self.checkpoint.rewind(self.run_state)
        if self.checkpoint.identity.all_args != context:
            self.sequences = self.trained_as = None
        self.watch.count_rewind(self.step, to_step)
        self.step, self.tokens_seen = to_step, tokens_seen
        self.metrics.rewind(to_step)
        if self.average is not None:
            self.average.enter(self.step)

    def _was_asked_to_stop(self) -> bool:
        """Whether any rank was, before its first step."""
        asked = torch.tensor(float(self.stop.number), device=self.device)
        all_asked = torch.stack(gather_from_ranks(asked))
        self.stop.agree(int(all_asked.max()))  # host sync: once, at start
        return self.stop.number != 0

    # -------------------------------------------------------------- parts of a step

    def _enter_step(self) -> None:
        """What the schedule says for this step."""
        now, before = self.schedule.at(self.tokens_seen), self.now
        self.now = now
        if now.sequences != self.sequences:
            self._change_sequences()
        self.trained_as = self.model_args
        if not now.phase:
            return
        if now.phase != before.phase:
            logger.info("Step %d: in phase %s: %s", self.step, now.title, now.describe())
        resume_lr_scheduler(self.lr_scheduler, self.lr_scheduler.last_epoch)  # also after a rewind
        self.model.set_coefficients(now.coefficients)

    def _change_sequences(self) -> None:
        """Their length, number in a forward pass or YaRN, between two steps. What depends on them
        is made anew, as a run that begins here would make it."""
        now = self.now
        self.sequences = now.sequences
        if self.trained_as is not None:
            longest = max(each.seq_len for each in self.schedule.begun(self.tokens_seen))
            self.kept["context_len"] = max(self.model_args.context_len or 0, longest)
        self.model_args = self._args_of(now)
        if self.trained_as is not None:
            self._tell(self.model_args.context_changes(self.trained_as))
        self.model.set_context(self.model_args)
        self.checkpoint.set_model_args(self.model_args)
        positions: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(positions, self.dataloader.local_state())
        state = merge_states(positions)
        self.dataloader.resize(state, batch_size=now.local_batch_size, seq_len=now.seq_len)
        if self.passes.pipeline is not None:
            self.passes.pipeline.forget_schedules()
        # Else the compiler would take the second length as a sign that lengths vary, and make code
        # for any, which is slower.
        torch.compiler.reset()
        set_timeout(self.config.comm.init_timeout_seconds, except_for=self.checkpoint.group)
        self.warming_up = True

    @property
    def accumulation(self) -> int:
        """Micro-batches of this step."""
        return self.now.batch_size // (self.now.local_batch_size * self.dims.dp_degree)

    def _next_batches(self, batches: Iterator[Batch], interval: Interval) -> list[Batch]:
        start = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.accumulation)]
        interval.data_seconds += time.perf_counter() - start
        tokens = sum(labels.numel() for _, labels in micro_batches) * self.dims.dp_degree
        interval.tokens += tokens
        interval.flops += tokens * self.model_args.train_flops_per_token(self.now.seq_len)
        self.tokens_seen += tokens
        return micro_batches

    def _update(self, local_loss: Tensor, grad_norm: Tensor, valid: Tensor) -> StepResult:
        """Weights and expert bias move together, or (non-finite) not at all."""
        moes = list(self.moes.values())
        group = self.dims.stage_group
        load = step_loads(moes, group) if moes else None
        # A request to stop travels with the loss: all ranks end after the same step.
        asked = torch.full_like(local_loss, float(self.stop.number))
        gathered = torch.cat(gather_from_ranks(torch.stack((local_loss, asked))))
        # host sync: a non-finite step must be known before the weights change
        last = torch.stack((valid.double(), grad_norm.double()))  # fp32 counts to 2**24 only
        *pairs, valid_tokens, norm = torch.cat((gathered.double(), last)).tolist()
        rank_losses = [pairs[2 * rank] for rank in self.dims.loss_ranks]
        asked_by = int(max(pairs[1::2]))
        verdict = self.watch.judge(self.step, rank_losses, norm)
        if verdict == "update":
            self._before_update()
            self.optimizer.step()
            if load is not None:
                update_expert_bias(moes, load.tokens_E)
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
            grad_norm=norm,
            lr=float(lr),
            loads=self._by_layer(load and load.tokens_E),
            traffic=self._by_layer(load and load.traffic),
            watched=self._by_layer(load and load.watched),
            side_losses={name: x.item() / valid_tokens for name, x in side.items()},
            valid_tokens=int(valid_tokens),
            verdict=verdict,
            asked_by=asked_by,
        )

    def _by_layer(self, rows: Tensor | None) -> dict[int, Tensor]:
        return {} if rows is None else dict(zip(self.moes, rows, strict=True))

    def _before_update(self) -> None:
        """Whoever copies the weights does so before they change."""
        self.checkpoint.before_update()
        if self.average is not None:
            self.average.before_update()

    def _routing_numbers(
        self, result: StepResult, biases: Mapping[int, Tensor | None]
    ) -> tuple[Numbers, Numbers]:
        """What expert parallelism sent, and how evenly the experts were used."""
        traffic, balance, args = {}, {}, self.model_args
        if not isinstance(args, DecoderArgs):
            return traffic, balance
        if self.dims.ep > 1:
            dtype = TORCH_DTYPES[self.config.training.mixed_precision_param]
            traffic = traffic_of(result, args, dtype)
        if result.loads:
            balance = balance_of(result, biases, traffic, args.moe_args.num_expert_groups)
        return traffic, balance

    def _validate(self) -> dict[str, float]:
        """The validation's numbers where it is due after this step, else none."""
        validator = self.validator
        if validator is None or not validator.is_due(self.step, self.config.training.steps):
            return {}
        numbers = validator.run(self.model, self.step)
        self.metrics.log_texts(validator.samples(self.model, self.tokenizer, self.step), self.step)
        return numbers

    def _log(self, result: StepResult, interval: Interval, validation: dict[str, float]) -> Action:
        """Also lets the alarms look; returns what they ask for."""
        counted = data_numbers(self.dataloader, self.device, self.dims.dp_group)
        biases = {layer: moe.expert_bias for layer, moe in self.moes.items()}
        if self.passes.pipeline is not None:  # of the layers on all stages
            result.loads, result.traffic, result.watched, biases = self.passes.pipeline.gather(
                (result.loads, result.traffic, result.watched, biases)
            )
        traffic, balance = self._routing_numbers(result, biases)
        self.metrics.log(
            step=self.step,
            loss=result.loss,
            max_loss=result.max_loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            tokens=interval.tokens,
            tokens_seen=self.tokens_seen,
            flops=interval.flops,
            step_seconds=interval.step_seconds,
            data_seconds=interval.data_seconds,
            expert_loads=result.loads,
            extra={
                "skipped_steps": self.watch.skipped_steps,
                "rewinds": self.watch.rewinds,
                **counted,
                **result.side_losses,
                **self.now.numbers(),
                **traffic,
                **balance,
                **validation,
            },
        )
        watched = balance | violation_numbers(result.loads)
        watched |= {"loss": result.loss, "grad_norm": result.grad_norm}
        if self.config.metrics.log_traffic and traffic:
            tokens = self.now.batch_size * self.now.seq_len
            logger.info("%s", traffic_line(traffic, tokens))
        return self.alarms.check(self.step, watched)
