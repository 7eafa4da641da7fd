"""The training run: what it is built from, and its three levels: train → train_step →
forward_backward.

The loss of a step is the sum over its tokens, divided once by the number of its valid tokens over
all ranks and micro-batches; gradients are sums too. So the layout of a run never changes its
numbers.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from torchtitan.components.balance import (
    Action,
    Alarms,
    Numbers,
    balance_numbers,
    cross_node_percent,
    routing_numbers,
    violation_numbers,
)
from torchtitan.components.checkpoint import WEIGHTS, build_checkpoint_manager
from torchtitan.components.checkpoint_state import RunState
from torchtitan.components.cuda_graph import GraphedPass
from torchtitan.components.dataloader import ParallelAwareDataLoader
from torchtitan.components.ema import WeightAverage
from torchtitan.components.fused_adam import FusedAdam
from torchtitan.components.hf_checkpoint import check_hf
from torchtitan.components.loss import IGNORE_INDEX, build_loss
from torchtitan.components.loss_watch import LossWatch, Verdict
from torchtitan.components.lr_scheduler import (
    build_lr_scheduler,
    build_phase_lr_scheduler,
    resume_lr_scheduler,
)
from torchtitan.components.metrics import MetricsLogger, device_name
from torchtitan.components.optimizer import build_optimizer, group_rules
from torchtitan.components.param_groups import check_groups
from torchtitan.components.schedule import Schedule, coefficients_set
from torchtitan.components.tokenizer import Tokenizer, load_tokenizer
from torchtitan.components.traffic import traffic_line, traffic_numbers
from torchtitan.components.validate import Validator
from torchtitan.components.working_weights import build_working_weights
from torchtitan.config import (
    JobConfig,
    Parallelism,
    resolve_degrees,
    resolve_global_batch_size,
    to_dict,
    validate,
)
from torchtitan.config.pipeline import PipelinePlan, plan_pipeline
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import check_memory_budget
from torchtitan.distributed.compile import check_compile_backend
from torchtitan.distributed.context_parallel import positions_of_this_rank
from torchtitan.distributed.expert_parallel import bytes_per_row
from torchtitan.distributed.fsdp import materialize, sync_replicas_on_last_microbatch
from torchtitan.distributed.grad_norm import clip_factor, clip_grad_norm
from torchtitan.distributed.pipeline_parallel import Pipeline, StepInputs, cut_into_parts
from torchtitan.distributed.utils import (
    gather_from_ranks,
    init_distributed,
    set_determinism,
    set_timeout,
    sum_over_ranks,
)
from torchtitan.hf_datasets import build_training_dataloader, check_training_data, data_numbers
from torchtitan.hf_datasets.validation_data import (
    build_validation_dataloader,
    check_validation_data,
)
from torchtitan.models.moe.balancing import Load, step_loads, update_expert_bias
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, get_flavor, get_train_spec
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.flops import peak_flops
from torchtitan.tools.gc import GarbageCollection
from torchtitan.tools.logging import logger
from torchtitan.tools.profiling import maybe_memory_snapshot, maybe_profile
from torchtitan.tools.signals import StopRequest
from torchtitan.tools.utils import (
    TORCH_DTYPES,
    check_local_processes,
    device_type,
    local_device,
)

Batch = tuple[dict[str, Tensor], Tensor]
Checked = tuple[TrainSpec, BaseModelArgs, Tokenizer]

# ------------------------------------------------------------------ build


def check_config(config: JobConfig) -> Checked:
    """Everything that can be found wrong before a process group or GPU is touched (`UserError`)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    validate(config, world_size, device_type())
    if config.comm.mode == "default":
        check_local_processes(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    check_compile_backend(config.compile)
    check_memory_budget(config.activation_checkpoint)
    spec = get_train_spec(config.model.name)
    model_args = get_flavor(spec, config.model.name, config.model.flavor).for_run(
        overrides=config.model.args,
        seq_len=config.training.seq_len,
        force_load_balance=config.debug.moe_force_load_balance,
    )
    tokenizer = load_tokenizer(config.model.hf_assets_path)
    if tokenizer.vocab_size > model_args.vocab_size:
        raise UserError(
            f"the tokenizer in model.hf_assets_path ({config.model.hf_assets_path}) has "
            f"{tokenizer.vocab_size} tokens, but model.flavor '{config.model.flavor}' only "
            f"{model_args.vocab_size}: set model.args.vocab_size to at least "
            f"{tokenizer.vocab_size}, or name the tokenizer of this model."
        )
    model_args.check_tokenizer(tokenizer.eos_id)
    model_args.check_coefficients(coefficients_set(config.schedule.phase))
    model_args.check_layout(config.parallelism)
    if config.optimizer.group:
        with torch.device("meta"):
            check_groups(config.optimizer.group, spec.model_cls(model_args))
    if config.compile.cuda_graph and model_args.has_side_losses:
        raise UserError(
            "compile.cuda_graph = true is not supported yet with multi-token prediction "
            "(model.args.n_mtp_layers); set either to false or 0."
        )
    pipeline_plan(config, model_args)
    check_training_data(config.training, tokenizer)
    check_hf(config, spec, model_args)
    check_validation_data(config.validation, model_args.max_seq_len)
    check_dump_folder(config.job.dump_folder)
    return spec, model_args, tokenizer


def pipeline_plan(config: JobConfig, model_args: BaseModelArgs) -> PipelinePlan | None:
    """None without pipeline parallelism. Raises `UserError`."""
    if config.parallelism.pipeline_parallel_degree == 1:
        return None
    return plan_pipeline(
        config.parallelism,
        num_layers=model_args.n_layers,
        local_batch_size=config.training.local_batch_size,
    )


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


def build_model(
    spec: TrainSpec,
    model_args: BaseModelArgs,
    dims: ParallelDims,
    config: JobConfig,
    device: torch.device,
    plan: PipelinePlan | None = None,
) -> tuple[BaseModel, list[BaseModel]]:
    """Shapes first (meta device), then spread over ranks, then each rank fills what it holds.

    Returns the model and, with a pipeline, its parts by stage.
    """
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(TORCH_DTYPES[config.training.dtype])
    try:
        with torch.device("meta"):
            model = spec.model_cls(model_args)
    finally:
        torch.set_default_dtype(default_dtype)
    num_params = sum(p.numel() for p in model.parameters())
    logger.info(
        "Model: %s %s, %s parameters", config.model.name, config.model.flavor, f"{num_params:,}"
    )
    parts = cut_into_parts(model, plan, dims.mesh["pp"].get_local_rank()) if plan else []
    for part in parts or [model]:
        spec.parallelize_fn(part, dims, config)
    materialize(model, device, offload=config.training.enable_cpu_offload)
    model.init_weights(buffer_device=device)
    return model.train(), parts


def build_parallel_dims(config: JobConfig, plan: PipelinePlan | None = None) -> ParallelDims:
    world_size = dist.get_world_size()
    dims = ParallelDims(
        last_stage=plan.rank_of(len(plan.stages) - 1) if plan else 0,
        world_size=world_size,
        device_type=device_type(),
        node_size=resolve_node_size(config.parallelism, world_size),
        **resolve_degrees(config.parallelism, world_size)._asdict(),
    )
    dims.make_groups()
    return dims


def resolve_node_size(parallelism: Parallelism, world_size: int) -> int:
    """Consecutive ranks of one node: as told, else as torchrun says, else all of them.

    An EP group that begins in the middle of a node counts in the parts that its nodes share.
    """
    if parallelism.expert_parallel_node_size is not None:
        return parallelism.expert_parallel_node_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    span = parallelism.expert_parallel_degree * parallelism.expert_tensor_parallel_degree
    return local if 0 in (local % span, span % local) else math.gcd(local, span)


def build_schedule(config: JobConfig, dp_degree: int) -> Schedule:
    schedule = Schedule(
        config.schedule.phase,
        lr=config.optimizer.lr,
        batch_size=resolve_global_batch_size(config, dp_degree),
    )
    if schedule.phases:
        num_steps = schedule.num_steps(config.training.seq_len)
        text = f"Schedule: {len(schedule.phases)} phases end after step {num_steps}"
        if config.training.steps == num_steps:
            logger.info("%s, and so does the run", text)
        else:
            logger.warning("%s, but training.steps = %d", text, config.training.steps)
    return schedule


def build_metrics(
    config: JobConfig, model_args: BaseModelArgs, device: torch.device, start_step: int
) -> MetricsLogger:
    settings, compute_dtype = config.metrics, TORCH_DTYPES[config.training.mixed_precision_param]
    return MetricsLogger(
        dump_folder=config.job.dump_folder,
        log_freq=settings.log_freq,
        total_steps=config.training.steps,
        enable_tensorboard=settings.enable_tensorboard,
        save_tb_folder=settings.save_tb_folder,
        save_for_all_ranks=settings.save_for_all_ranks,
        disable_color_printing=settings.disable_color_printing,
        device=device,
        flops_per_token=model_args.train_flops_per_token(config.training.seq_len),
        peak_flops=peak_flops(device_name(device), compute_dtype),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        start_step=start_step,
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


@contextmanager
def profilers(config: JobConfig, rank: int) -> Iterator[Callable[[], None]]:
    """Traces and memory snapshots, where asked for; call what it yields after every step."""
    settings = config.profiling
    where = {"dump_folder": config.job.dump_folder, "rank": rank}
    with (
        maybe_profile(
            enable_profiling=settings.enable_profiling,
            save_traces_folder=settings.save_traces_folder,
            profile_freq=settings.profile_freq,
            profiler_active=settings.profiler_active,
            profiler_warmup=settings.profiler_warmup,
            **where,
        ) as profiler,
        maybe_memory_snapshot(
            enable_memory_snapshot=settings.enable_memory_snapshot,
            save_memory_snapshot_folder=settings.save_memory_snapshot_folder,
            profile_freq=settings.profile_freq,
            **where,
        ) as snapshots,
    ):

        def after_step() -> None:
            profiler.step()
            snapshots.step()

        yield after_step


# ------------------------------------------------------------------ run


@dataclass
class StepResult:
    """loss: mean over the valid tokens of all ranks. max_loss: the same of the worst rank (exact
    when all have as many). grad_norm: before clipping. loads: tokens per expert (E,), by layer;
    traffic: see `TokenDispatcher.dispatch`, by layer. watched: see models/moe/watch.py, by layer;
    empty without metrics.log_routing. side_losses: by name, means as `loss` is. valid_tokens: of
    the step, over all ranks. verdict: what became of the step. stop: some rank was asked to end
    the run.
    """

    loss: float
    max_loss: float
    grad_norm: float
    lr: float
    loads: dict[int, Tensor]
    traffic: dict[int, Tensor]
    watched: dict[int, Tensor]
    side_losses: dict[str, float]
    valid_tokens: int
    verdict: Verdict
    stop: bool


@dataclass
class Interval:
    """What adds up between two log lines."""

    tokens: int = 0
    step_seconds: list[float] = field(default_factory=list)
    data_seconds: float = 0.0


class Trainer:
    """One run from its config. Use `train`, then `close`.

    Raises `UserError` for what the user can mend, `RunError` when training itself has failed.
    """

    def __init__(self, config: JobConfig, checked: Checked | None = None):
        """checked: what `check_config(config)` returned, where it has been called already."""
        self.config = config
        spec, self.model_args, self.tokenizer = checked or check_config(config)
        self._open = ExitStack()
        try:
            self._build(spec)
        except BaseException:
            self._open.close()
            raise

    def _build(self, spec: TrainSpec) -> None:
        config, training = self.config, self.config.training
        self.device = local_device()
        leave = init_distributed(config.comm, self.device, config.job.dump_folder)
        self._open.callback(leave)
        self.rank = dist.get_rank()
        logger.info("%s", config.job.description)
        if self.rank == 0:
            save_config(config, self.model_args)
        plan = pipeline_plan(config, self.model_args)
        self.dims = build_parallel_dims(config, plan)
        # With context parallelism: of this rank's part of each sequence.
        self.positions = positions_of_this_rank(self.dims, training.seq_len, self.device)
        self.checkpoint = build_checkpoint_manager(config, spec, self.model_args, asdict(self.dims))
        self._open.callback(self.checkpoint.close)
        start = self.checkpoint.find_start()
        seed = self.checkpoint.seed = set_determinism(config.debug, self.device, start.seed)
        self.dataloader = self._build_dataloader(seed)
        self.model, parts = build_model(spec, self.model_args, self.dims, config, self.device, plan)
        # also of the groups that are new now
        set_timeout(config.comm.init_timeout_seconds, except_for=self.checkpoint.group)
        self.moes = self.model.moe_layers()
        for moe in self.moes.values():
            moe.watch_routing = config.metrics.log_routing
            moe.step_group = self.dims.stage_group if self.dims.stage_size > 1 else None
        if self.moes and all(moe.expert_bias is None for moe in self.moes.values()):
            logger.warning(
                "Nothing evens out the expert load: model.args.moe_args.load_balance_coeff is not "
                "set (1e-3 is the usual speed of the bias)"
            )
        self.step = self.tokens_seen = 0
        self.schedule = build_schedule(config, self.dims.dp_degree)
        self.now = self.schedule.at(0)
        self.working = build_working_weights(
            self.model,
            config,
            dist.get_world_size(),
            # A batch that grows takes several micro-batches sooner or later.
            several_passes=self.accumulation > 1 or bool(self.schedule.phases),
        )
        self.graphed = GraphedPass(self._pass_and_clip) if config.compile.cuda_graph else None
        with torch.device("meta"):  # the whole model, also where this rank has a stage of it
            group_rules(config.optimizer).log(spec.model_cls(self.model_args))
        self.optimizer = build_optimizer(
            [self.model], working=self.working, **vars(config.optimizer)
        )
        self.average = WeightAverage(self.model, config.ema) if config.ema.enable else None
        if self.average is not None:
            self._open.callback(self.average.close)
        self.lr_scheduler = self._build_lr_scheduler()
        # The model's own loss holds no logits; a CPU has the memory, and one GEMM is its fastest.
        # Split logits, pipelines and further tokens' losses have losses of their own.
        self.model_has_loss = (
            self.model.computes_loss
            and self.device.type != "cpu"
            and self.dims.tp == 1
            and plan is None
            and not self.model_args.has_side_losses
        )
        self.loss_fn = build_loss(
            self.dims, disable_loss_parallel=config.parallelism.disable_loss_parallel
        )
        if config.compile.enable and "loss" in config.compile.components:
            self.loss_fn = torch.compile(self.loss_fn, backend=config.compile.backend)
        self.pipeline = self._build_pipeline(parts, plan) if plan else None
        self.metrics = build_metrics(config, self.model_args, self.device, start.step)
        self._open.callback(self.metrics.close)
        self.gc = GarbageCollection(training.gc_freq, training.gc_debug)
        self._open.callback(self.gc.close)
        self.watch = LossWatch(
            training,
            self.dims.loss_ranks,
            early_step=config.optimizer.early_step_in_backward,
        )
        self.alarms = Alarms(config.metrics.alarm)
        self.stop = StopRequest()
        self.run_state = RunState(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.dataloader,
            progress=self,
            average=self.average,
        )
        self.checkpoint.load(self.run_state, start)
        if self.average is not None:
            self.average.enter(self.step)
        self.validator = self._build_validator() if config.validation.enable else None

    def _build_validator(self) -> Validator:
        settings = self.config.validation
        ranks = {"dp_rank": self.dims.dp_rank(self.rank), "dp_degree": self.dims.dp_degree}
        loader = build_validation_dataloader(settings, self.tokenizer, **ranks)
        return Validator(settings, loader, self._loss_sum_once, device=self.device)

    def _build_pipeline(self, parts: list[BaseModel], plan: PipelinePlan) -> Pipeline:
        training, tp, cp = self.config.training, self.dims.tp, self.dims.cp
        tokens = training.seq_len // cp
        vocab_parts = 1 if self.config.parallelism.disable_loss_parallel else tp
        return Pipeline(
            parts,
            plan,
            self.config.parallelism,
            mesh=self.dims.mesh["pp"],
            device=self.device,
            tokens=(tokens,),
            hidden=(tokens // tp, self.model_args.stage_channels),
            logits=(tokens, self.model_args.vocab_size // vocab_parts),
            dtype=TORCH_DTYPES[training.mixed_precision_param],
            loss_fn=self.loss_fn,
            masks_of=self._attention_masks,
        )

    def _build_lr_scheduler(self) -> LambdaLR:
        config = self.config
        if not self.schedule.phases:
            return build_lr_scheduler(
                self.optimizer, total_steps=config.training.steps, **asdict(config.lr_scheduler)
            )
        return build_phase_lr_scheduler(
            self.optimizer,
            lambda: self.schedule.at(self.tokens_seen).lr,
            lr=config.optimizer.lr,
            warmup_steps=config.lr_scheduler.warmup_steps,
        )

    def _build_dataloader(self, seed: int) -> ParallelAwareDataLoader:
        ranks = {"dp_rank": self.dims.dp_rank(self.rank), "dp_degree": self.dims.dp_degree}
        return build_training_dataloader(self.config, self.tokenizer, seed=seed, **ranks)

    def train(self) -> None:
        """All steps, with their log lines."""
        config, steps = self.config, self.config.training.steps
        logger.info(
            "Training: %d steps of %d sequences of %d tokens",
            steps,
            self.now.batch_size,
            config.training.seq_len,
        )
        batches, interval = iter(self.dataloader), Interval()
        stopping = timeout_set = False
        with profilers(config, self.rank) as profile_step, self._listening():
            while self.step < steps and not stopping:
                self.step += 1
                self.gc.run(self.step)
                start = time.perf_counter()
                result = self.train_step(batches, interval)
                interval.step_seconds.append(time.perf_counter() - start)
                stopping = result.stop
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
                if not timeout_set:
                    set_timeout(config.comm.train_timeout_seconds, self.checkpoint.group)
                    timeout_set = True
            self.checkpoint.finish()
        how = "finished" if self.step >= steps else f"stopped short of {steps} steps,"
        logger.info("Training %s after step %d", how, self.step)

    def train_step(self, batches: Iterator[Batch], interval: Interval) -> StepResult:
        """One optimizer step over `accumulation` micro-batches."""
        self._enter_step()
        micro_batches = self._next_batches(batches, interval)
        valid = sum((labels != IGNORE_INDEX).sum() for _, labels in micro_batches)
        valid_tokens = sum_over_ranks(valid.to(self.device), self.dims.dp_group).clamp(min=1)

        if self.config.optimizer.early_step_in_backward:
            self._before_update()
        if self.graphed is not None:
            self.model.set_tokens_in_step(valid_tokens)
            numbers = self._graphed_pass(micro_batches[0], valid_tokens)
            return self._update(*numbers, valid_tokens)
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
        self.model.set_tokens_in_step(valid_tokens)
        inputs = self._inputs(batch)
        if self.pipeline is not None:
            return self.pipeline.step(inputs, valid_tokens)
        masks = self._attention_masks(batch[0]["input"])
        return self._pass(
            inputs.tokens, inputs.labels, valid_tokens, masks, inputs.positions, **inputs.extra
        )

    def loss_sum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Over this rank's valid labels of a batch, and how many these are."""
        inputs = self._inputs(batch)
        count = inputs.token_mask.sum()
        if self.pipeline is not None:
            return self.pipeline.evaluate(inputs), count
        masks = self._attention_masks(batch[0]["input"])
        loss = self._loss_sum(inputs.tokens, inputs.labels, masks, inputs.positions, **inputs.extra)
        return loss, count

    def _inputs(self, batch: Batch) -> StepInputs:
        """On the device; with context parallelism, this rank's part of each sequence."""
        tokens, labels = batch[0]["input"].to(self.device), batch[1].to(self.device)
        whole, positions = tokens, None
        extra = self.model.extra_inputs(tokens, labels, self.tokenizer.eos_id, self.positions)
        if self.positions is not None:
            tokens, labels = tokens[:, self.positions], labels[:, self.positions]
            positions = self.positions.unsqueeze(0)
        return StepInputs(tokens, labels, whole, positions, labels != IGNORE_INDEX, extra)

    def _loss_sum_once(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`loss_sum` for adding up over all ranks."""
        loss, count = self.loss_sum(batch)
        return self._counted_once(loss), self._counted_once(count)

    def _counted_once(self, of_tokens: Tensor) -> Tensor:
        """Zero on ranks that only repeat another's (tensor parallelism, earlier stages)."""
        return of_tokens if self.rank in self.dims.loss_ranks else torch.zeros_like(of_tokens)

    def _attention_masks(self, tokens: Tensor) -> Any:
        """Of whole sequences; with gathered keys, for the positions that this rank computes."""
        gathers = self.config.parallelism.context_parallel_rotate_method == "allgather"
        queries = self.positions if gathers else None
        return self.model.get_attention_masks(tokens, self.tokenizer.eos_id, queries, self.device)

    def _graphed_pass(self, batch: Batch, valid_tokens: Tensor) -> tuple[Tensor, ...]:
        """Loss and gradient norm of a step whose kernels are replayed."""
        inputs = self._inputs(batch)
        if self._attention_masks(batch[0]["input"]) is not None:
            raise UserError(
                "compile.cuda_graph = true needs the same kernels in every step, but the documents "
                "of model.args.attn_mask_type 'block_causal' change; set either to its default."
            )
        if self.working is not None:
            self.working.refresh()
        if not self.graphed.holds_grads:
            self.optimizer.zero_grad()
        loss_and_norm = self.graphed(inputs.tokens, inputs.labels, valid_tokens)
        if isinstance(self.optimizer, FusedAdam):
            self.optimizer.as_graph = self.graphed.holds_grads
        return loss_and_norm

    def _pass_and_clip(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass(*inputs), self._clip()

    def _pass(
        self,
        tokens: Tensor,
        labels: Tensor,
        valid_tokens: Tensor,
        masks: Any = None,
        positions: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        loss = self._loss_sum(tokens, labels, masks, positions, **extra) / valid_tokens
        loss.backward()
        return loss.detach()

    def _loss_sum(
        self, tokens: Tensor, labels: Tensor, masks: Any, positions: Tensor | None, **extra: Any
    ) -> Tensor:
        out = self.model(
            tokens,
            attention_masks=masks,
            positions=positions,
            token_mask=labels != IGNORE_INDEX,
            **({"labels": labels} if self.model_has_loss else {}),
            **extra,
        )
        # The logits, the largest activation, are freed as soon as their gradient is there.
        return out if self.model_has_loss else self.loss_fn(out, labels)

    def close(self) -> None:
        """Release files and process groups; safe to call twice."""
        self._open.close()

    # -------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The counters that a checkpoint keeps, JSON only, the same on all ranks."""
        watch = self.watch.state_dict()
        return {"step": self.step, "tokens_seen": self.tokens_seen, "loss_watch": watch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.tokens_seen = state["tokens_seen"]
        self.watch.load_state_dict(state["loss_watch"])

    def save_seed(self) -> None:
        """The weights as they were initialised, as step 0: any layout can begin from them."""
        self.checkpoint.save(self.run_state, 0, WEIGHTS)
        self.checkpoint.finish()

    def _rewind(self) -> None:
        """Back to the last checkpoint; the data goes on after the batch that was just read."""
        self.optimizer.zero_grad()
        to_step, tokens_seen = self.checkpoint.rewind(self.run_state)
        self.watch.count_rewind(self.step, to_step)
        self.step, self.tokens_seen = to_step, tokens_seen
        if self.average is not None:
            self.average.enter(self.step)

    def _listening(self) -> AbstractContextManager:
        """Signals ask for a last checkpoint where there are checkpoints, else they just end us."""
        return self.stop if self.checkpoint.saves else nullcontext()

    # -------------------------------------------------------------- parts of a step

    def _enter_step(self) -> None:
        """What the schedule says for this step."""
        now, before = self.schedule.at(self.tokens_seen), self.now
        self.now = now
        if not now.phase:
            return
        if now.phase != before.phase or self.step == 1:
            logger.info("Step %d: in phase %s: %s", self.step, now.title, now.describe())
        resume_lr_scheduler(self.lr_scheduler, self.lr_scheduler.last_epoch)  # also after a rewind
        self.model.set_coefficients(now.coefficients)

    @property
    def accumulation(self) -> int:
        """Micro-batches of this step."""
        at_once = self.config.training.local_batch_size * self.dims.dp_degree
        return self.now.batch_size // at_once

    def _next_batches(self, batches: Iterator[Batch], interval: Interval) -> list[Batch]:
        start = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.accumulation)]
        interval.data_seconds += time.perf_counter() - start
        tokens = sum(labels.numel() for _, labels in micro_batches) * self.dims.dp_degree
        interval.tokens += tokens
        self.tokens_seen += tokens
        return micro_batches

    def _update(self, local_loss: Tensor, grad_norm: Tensor, valid: Tensor) -> StepResult:
        """Weights and expert bias move together, or (non-finite) not at all."""
        moes = list(self.moes.values())
        group = self.dims.stage_group
        load = step_loads(moes, group) if moes else Load([], [])
        loads_LE, traffic_L23, watched_L5 = load.tokens_E, load.traffic, load.watched
        # A request to stop travels with the loss: all ranks end after the same step.
        asked = torch.full_like(local_loss, float(self.stop.requested))
        gathered = torch.cat(gather_from_ranks(torch.stack((local_loss, asked))))
        # host sync: a non-finite step must be known before the weights change
        last = torch.stack((valid.double(), grad_norm.double()))  # fp32 counts to 2**24 only
        *pairs, valid_tokens, norm = torch.cat((gathered.double(), last)).tolist()
        rank_losses = [pairs[2 * rank] for rank in self.dims.loss_ranks]
        stop = any(pairs[1::2])
        verdict = self.watch.judge(self.step, rank_losses, norm)
        if verdict == "update":
            self._before_update()
            self.optimizer.step()
            update_expert_bias(moes, loads_LE)
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
            lr=lr,
            loads=dict(zip(self.moes, loads_LE, strict=True)),
            traffic=dict(zip(self.moes, traffic_L23, strict=True)),
            watched={} if watched_L5 is None else dict(zip(self.moes, watched_L5, strict=True)),
            side_losses={name: x.item() / valid_tokens for name, x in side.items()},
            valid_tokens=int(valid_tokens),
            verdict=verdict,
            stop=stop,
        )

    def _before_update(self) -> None:
        """Whoever copies the weights does so before they change."""
        self.checkpoint.before_update()
        if self.average is not None:
            self.average.before_update()

    def _traffic_of(self, result: StepResult) -> dict[str, object]:
        """What expert parallelism sent in this step, over all ranks."""
        if self.dims.ep == 1:
            return {}
        row = bytes_per_row(
            self.model_args.dim,
            self.model_args.moe_args.top_k,
            TORCH_DTYPES[self.config.training.mixed_precision_param],
        )
        return traffic_numbers(result.traffic, row)

    def _balance_of(
        self,
        result: StepResult,
        biases: Mapping[int, Tensor | None],
        traffic: Mapping[str, object],
    ) -> Numbers:
        """How evenly the step used the experts; the same on all ranks."""
        if not result.loads:
            return {}
        num_groups = self.model_args.moe_args.num_expert_groups
        numbers = balance_numbers(result.loads, biases, num_groups)
        if result.watched:
            numbers |= routing_numbers(result.watched, result.valid_tokens, result.loads)
        return numbers | cross_node_percent(traffic)

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
        if self.pipeline is not None:  # of the layers on all stages
            result.loads, result.traffic, result.watched, biases = self.pipeline.gather(
                (result.loads, result.traffic, result.watched, biases)
            )
        traffic = self._traffic_of(result)
        balance = self._balance_of(result, biases, traffic)
        self.metrics.log(
            step=self.step,
            loss=result.loss,
            max_loss=result.max_loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            tokens=interval.tokens,
            tokens_seen=self.tokens_seen,
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
            tokens = self.now.batch_size * self.config.training.seq_len
            logger.info("%s", traffic_line(traffic, tokens))
        return self.alarms.check(self.step, watched)
