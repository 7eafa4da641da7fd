"""Construction of a run: its parts, built in an order that matters."""

from contextlib import ExitStack
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.components.checkpoint import build_checkpoint_manager
from torchtitan.components.checkpoint.resume import Start
from torchtitan.components.checkpoint.run_state import RunState
from torchtitan.components.dump_folder import alone_in_folders, save_config
from torchtitan.components.finetuning.routing_watch import RoutingWatch
from torchtitan.components.finetuning.trained import log_trained, make_whole_model
from torchtitan.components.metrics.loss_guard import LossGuard
from torchtitan.components.metrics.waiting import WaitProfile
from torchtitan.components.optimizer import build_optimizer, clip_gradients, group_rules
from torchtitan.components.optimizer.build_compute_weights import build_compute_weights
from torchtitan.components.optimizer.ema import WeightAverage
from torchtitan.components.quantize.float8 import log_float8
from torchtitan.components.validate import Validator
from torchtitan.config import JobConfig
from torchtitan.config.dry_run import without_checkpoints
from torchtitan.config.phases import largest_coefficients
from torchtitan.data import build_training_dataloader
from torchtitan.data.validation import identity_of_sets, open_validation_sets
from torchtitan.distributed.agreement import Settings
from torchtitan.distributed.all_gather_dispatch import row_capacity
from torchtitan.distributed.pipeline_plan import PipelinePlan
from torchtitan.distributed.utils import (
    init_distributed,
    meeting_of_ranks,
    set_determinism,
    set_timeout,
)
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.tools.cpu import bound_onednn_cache, lacks_bf16
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.gc import GarbageCollection
from torchtitan.tools.logging import logger
from torchtitan.tools.signals import StopRequest
from torchtitan.tools.utils import local_device
from torchtitan.trainer.build import (
    build_lr_scheduler,
    build_metrics,
    build_model,
    build_parallel_dims,
    build_schedule,
)
from torchtitan.trainer.forward_backward import Batch, ForwardBackward, GraphedStep
from torchtitan.trainer.phase_changes import Phases
from torchtitan.trainer.preflight import Checked, check_config, pipeline_plan
from torchtitan.trainer.progress import Progress
from torchtitan.trainer.same_run import identity_of_start, settings_of_run
from torchtitan.trainer.step_log import StepLog


class BuiltRun:
    """Builds and holds the parts of a run; `Trainer` trains with them.

    Raises `UserError` for mistakes of the user.

    checked: result of `check_config(config)`; None = it is called here.
    stop: a listener that receives signals already; None = a new one.
    """

    def __init__(
        self,
        config: JobConfig,
        checked: Checked | None = None,
        stop: StopRequest | None = None,
    ):
        self.config = config = without_checkpoints(config)
        self.stop = stop or StopRequest()
        self.checked = checked or check_config(config)
        self.spec, self._checked_args, self.tokenizer = self.checked
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
        """Build everything, in an order that matters: groups, then data and model, then the
        optimizer, then metrics and logs; last, load the state of an earlier run."""
        plan = self._join_ranks()
        config = self.config
        layout = asdict(self.dims)
        schedule = build_schedule(config, self.dims.dp_degree)
        self.phases = Phases(config, self.spec, self._checked_args, schedule)
        self.checkpoint = build_checkpoint_manager(config, self.spec, self.model_args, layout)
        self._open.callback(self.checkpoint.close)
        start = self.checkpoint.find_start()
        self._keep_context(start)
        seed = self.checkpoint.seed = set_determinism(config.debug, self.device, start.seed)
        ranks = {"dp_rank": self.dims.dp_rank(self.rank), "dp_degree": self.dims.dp_degree}
        meeting_of_ranks(config.comm).agree(lambda: self._open_data(start, seed, ranks))
        self._build_model(plan)
        self._build_counters()
        self._build_updates()
        self._build_watchers(start.step)
        self.run_state = RunState(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.dataloader,
            progress=self.progress,
            average=self.average,
        )
        self.checkpoint.load(self.run_state, start)
        if self.average is not None:
            self.average.enter(self.step)

    def _join_ranks(self) -> PipelinePlan | None:
        """Make the process groups. Returns the pipeline's plan, None without one."""
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
            save_config(config, self._checked_args)
            self._warn_of_slow_dtype()
        plan = pipeline_plan(config, self._checked_args)
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
        """Lock the run's folders, on rank 0. Returns settings that must be equal on all ranks."""
        if rank == 0:
            self._open.enter_context(alone_in_folders(self.config))
        return settings_of_run(self.config, self.checked)

    def _open_data(self, start: Start, seed: int, ranks: dict[str, int]) -> Settings:
        """Open training and validation data. Returns settings that must be equal on all ranks."""
        config = self.config
        self.dataloader = build_training_dataloader(config, self.tokenizer, seed=seed, **ranks)
        found = self.dataloader.identity() | identity_of_start(start.path)
        if config.validation.enable:
            self.validation_sets = open_validation_sets(config, self.tokenizer, **ranks)
            identity = identity_of_sets(self.validation_sets)
            found |= {f"validation: {name}": value for name, value in identity.items()}
        return found

    def _keep_context(self, start: Start) -> None:
        """Keep the context of stored weights, see `Phases.keep_context`."""
        stored = self.checkpoint.stored_args(start, self.model_args)
        self._warn(self.phases.keep_context(stored, start.tokens_seen, in_hf=start.in_hf))
        if stored is None:
            return
        self.checkpoint.set_model_args(self.model_args)
        if self.rank == 0:
            save_config(self.config, self.model_args)

    def _warn(self, sentences: list[str]) -> None:
        for sentence in sentences if self.rank == 0 else []:
            logger.warning("%s", sentence)

    def _build_model(self, plan: PipelinePlan | None) -> None:
        config, dims = self.config, self.dims
        self.model: BaseModel
        self.model, parts = build_model(self.spec, self.model_args, dims, config, self.device, plan)
        # again, because the model has made groups
        set_timeout(config.comm.init_timeout_seconds, except_for=self.checkpoint.group)
        self.moes = self.model.moe_layers()
        self.capacity = row_capacity(self.moes.values())
        for moe in self.moes.values():
            moe.collect_router_stats = config.metrics.log_routing
        if self.rank == 0:
            largest = largest_coefficients(config.schedule.phase)
            for sentence in self.model_args.without_effect(config.model.args, largest):
                logger.warning("%s", sentence)
        self.passes = ForwardBackward(
            config,
            self.model,
            dims,
            self.device,
            eos_id=self.tokenizer.eos_id,
            parts=parts,
            plan=plan,
        )

    def _build_counters(self) -> None:
        """Build the loss guard, validation, and the counters of a run."""
        config = self.config
        self.loss_guard = LossGuard(
            config.training,
            self.dims.loss_ranks,
            early_step=config.optimizer.early_step_in_backward,
        )
        self.validator = None
        if config.validation.enable:
            self.validator = Validator(
                config, self.tokenizer, self.validation_sets, self.loss_sum, device=self.device
            )
        self.progress = Progress(
            schedule=self.phases.schedule,
            loss_guard=self.loss_guard,
            moes=self.moes,
            pipeline=self.passes.pipeline,
            validator=self.validator,
            dp_degree=self.dims.dp_degree,
        )

    def _build_updates(self) -> None:
        """Build the parts that change weights: optimizer, learning rate, average."""
        config, schedule = self.config, self.phases.schedule
        compute_weights = self.compute_weights = build_compute_weights(
            self.model,
            config,
            self.dims,
            # A growing batch takes several micro-batches sooner or later.
            several_passes=self.accumulation > 1 or bool(schedule.phases),
        )
        # The whole model, also where this rank has a stage of it.
        whole = make_whole_model(self.spec, self.model_args, config)
        log_trained(whole, config)
        log_float8(whole, config)
        group_rules(config.optimizer).log(whole)
        self.optimizer = build_optimizer(
            [self.model], compute_weights=compute_weights, **vars(config.optimizer)
        )
        self.graphed = None
        if config.compile.cuda_graph:
            self.graphed = GraphedStep(self.passes, self.optimizer, compute_weights, self._clip)
            # Before the process groups: NCCL waits for ever for graphs that hold its communicators.
            self._open.callback(self.graphed.forget)
        self.average = WeightAverage(self.model, config.ema) if config.ema.enable else None
        if self.average is not None:
            self._open.callback(self.average.close)
        self.lr_scheduler = build_lr_scheduler(
            config, self.optimizer, schedule, lambda: self.tokens_seen
        )

    def _build_watchers(self, start_step: int) -> None:
        config, training = self.config, self.config.training
        self.metrics = build_metrics(config, self.device, start_step)
        self._open.callback(self.metrics.close)
        self.checkpoint.on_event = self.metrics.event
        # Two profilers at a time can't be.
        freq = 0 if config.profiling.enable_profiling else config.metrics.waiting_freq
        self.waiting = WaitProfile(freq, self.device)
        self.gc = GarbageCollection(training.gc_freq, training.gc_debug)
        self._open.callback(self.gc.close)
        self.step_log = StepLog(
            config,
            self.dims,
            self.device,
            metrics=self.metrics,
            dataloader=self.dataloader,
            moes=self.moes,
            pipeline=self.passes.pipeline,
            loss_guard=self.loss_guard,
        )
        pipeline = self.passes.pipeline
        self.routing_watch = RoutingWatch(
            config,
            self.tokenizer,
            self.model_args.max_seq_len,
            dims=self.dims,
            device=self.device,
            forward=self.passes.loss_sum,
            gather=None if pipeline is None else pipeline.gather,
        )
        self.warming_up = True  # the next step may compile

    @property
    def step(self) -> int:
        """Steps done; during a step, its number."""
        return self.progress.step

    @step.setter
    def step(self, number: int) -> None:
        self.progress.step = number

    @property
    def tokens_seen(self) -> int:
        return self.progress.tokens_seen

    @property
    def model_args(self) -> BaseModelArgs:
        """Model arguments for the current sequences."""
        return self.phases.model_args

    @property
    def accumulation(self) -> int:
        """Micro-batches of this step."""
        return self.phases.now.accumulation(self.dims.dp_degree)

    def _clip(self) -> Tensor:
        max_norm = self.config.training.max_norm
        return clip_gradients(self.optimizer, self.model.parameters(), max_norm)

    def loss_sum(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return `ForwardBackward.loss_sum` of a validation batch, as numbers that add up over
        ranks."""
        of_answers = "documents" in batch[0]
        loss, count, found = self.passes.loss_sum(batch, hits=of_answers)
        return self._counted_once(loss), self._counted_once(count), self._counted_once(found)

    def _counted_once(self, of_tokens: Tensor) -> Tensor:
        """Set to zero on ranks that only repeat another's value (tensor parallelism, earlier
        stages)."""
        return of_tokens if self.rank in self.dims.loss_ranks else torch.zeros_like(of_tokens)

    def close(self) -> None:
        """Release files and process groups; safe to call twice."""
        self._open.close()
