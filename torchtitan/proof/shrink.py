"""Shrink the config of a large run to a tiny one that a CPU trains in seconds, and its reference.

Only sizes shrink: never a degree below 2, a schedule, a dispatcher, recomputation, a mask, a loss,
the optimizer or a phase. Features that this machine lacks (GPUs, compilers, FP8) are off.
"""

from dataclasses import replace
from fnmatch import filter as filter_names
from typing import Any, cast

import torch

from torchtitan.components.finetuning.lora import adaptable, add_adapters
from torchtitan.components.finetuning.trained import is_finetuning, make_whole_model
from torchtitan.components.optimizer.param_groups import trainable
from torchtitan.config import (
    Checkpoint,
    Comm,
    Debug,
    JobConfig,
    Metrics,
    Parallelism,
    ParamGroup,
    Profiling,
)
from torchtitan.config.manager import deep_merge
from torchtitan.config.phases import run_schedule
from torchtitan.config.quantize_tables import FLOAT8
from torchtitan.data.tokenizer import DEFAULT_PATH, load_tokenizer
from torchtitan.models.decoder import DecoderArgs
from torchtitan.proof.small_model import small_model
from torchtitan.proof.small_steps import (
    Stages,
    Steps,
    small_microbatches,
    small_stages,
    small_steps,
)
from torchtitan.proof.worlds import World
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.trainer.preflight import model_args_of, pipeline_plan

SEED = 7
# A back-end that keeps to a memory budget, and compiles in a second.
BUDGETING = "aot_eager_decomp_partition"


def shrink(config: JobConfig, args: BaseModelArgs, whole: World, world: World) -> JobConfig:
    """Return the config of `world`, which stands for `whole`; data and folder are set elsewhere.

    args: model arguments of the user's run.
    """
    plan = pipeline_plan(config, args)
    pp = world.degrees.pp
    stages = small_stages(config, args.n_layers, plan, pp)
    schedule = run_schedule(config, whole.dp_degree)
    least = min(2, config.training.local_batch_size)
    if plan is not None and pp > 1:
        sizes = {end.local_batch_size for end in schedule.ends}
        least = small_microbatches(plan, stages.count, pp, len(sizes))
    yarn_from = getattr(args, "original_seq_len", 0)
    steps = small_steps(config, schedule, whole, world, least, yarn_from)
    tokenizer = load_tokenizer(DEFAULT_PATH)
    model = small_model(
        cast(DecoderArgs, args), config.parallelism, world, tokenizer.vocab_size, stages.n_layers
    )
    if yarn_from:
        model["original_seq_len"] = steps.lengths[yarn_from]
    overrides = deep_merge(config.model.args, model)
    overrides.pop("max_seq_len", None)
    config = _patterns_left(_on_this_machine(config, steps.steps), overrides)
    return replace(
        config,
        model=replace(config.model, args=overrides, hf_assets_path=f"./{DEFAULT_PATH}"),
        training=replace(config.training, **_training(config, steps)),
        schedule=replace(config.schedule, phase=steps.phases),
        optimizer=replace(
            config.optimizer,
            lr=config.optimizer.lr * steps.rate,
            group=_groups_left(config, overrides),
        ),
        lr_scheduler=replace(
            config.lr_scheduler, warmup_steps=min(2, config.lr_scheduler.warmup_steps)
        ),
        ema=replace(
            config.ema,
            start_step=min(1, config.ema.start_step),
            interval=min(2, config.ema.interval),
        ),
        parallelism=_parallelism(config.parallelism, world, stages),
    )


def _training(config: JobConfig, steps: Steps) -> dict[str, Any]:
    training = config.training
    sizes = {
        "seq_len": steps.lengths[training.seq_len],
        "local_batch_size": steps.passes[training.local_batch_size],
        "global_batch_size": steps.batch_size,
        "steps": steps.steps,
        "dataset_num_workers": 0,
        "dataset_lanes": None,
        "enable_cpu_offload": False,
        "dtype": "float32",
        "mixed_precision_param": "float32",
        "loss_spike_factor": None,
        "loss_spike": "warn",
        "non_finite_loss": "stop",
    }
    if training.fim_rate > 0:  # any three tokens of the small tokenizer will do
        sizes["fim_tokens"] = ["<|begin_of_text|>", "<|pad|>", "~"]
    return sizes


def _patterns_left(config: JobConfig, overrides: dict[str, Any]) -> JobConfig:
    """Without the patterns of frozen parameters and adapters that name nothing in the small model,
    and without a folder of adapters, whose sizes are others."""
    if not is_finetuning(config):
        return config
    spec = get_train_spec(config.model.name)
    small = replace(config, model=replace(config.model, args=overrides))
    with torch.device("meta"):
        model = spec.model_cls(model_args_of(small, spec, config.training.seq_len))
    matrices = set(adaptable(model))
    lora = config.lora
    if "lora" in config.model.converters:
        adapted = _left(matrices, lora.fqns)
        override = [replace(t, fqns=_left(matrices, t.fqns)) for t in lora.override]
        override = [table for table in override if table.fqns]
        lora = replace(lora, fqns=adapted, override=override, initial_load_path=None)
        add_adapters(model, lora)
    names = {name for name, _ in model.named_parameters()}
    trained, frozen = (
        _left(names, getattr(config.training, key)) for key in ("trainable_fqns", "frozen_fqns")
    )
    training = replace(config.training, trainable_fqns=trained, frozen_fqns=frozen)
    return replace(config, lora=lora, training=training)


def _left(names: set[str], patterns: list[str]) -> list[str]:
    return [pattern for pattern in patterns if filter_names(names, pattern)]


def _groups_left(config: JobConfig, overrides: dict[str, Any]) -> list[ParamGroup]:
    """Return [[optimizer.group]] without patterns that match nothing in the small model: they name
    layers that it hasn't, or parameters that an earlier table has."""
    left: list[ParamGroup] = []
    if not config.optimizer.group:
        return left
    spec = get_train_spec(config.model.name)
    small = replace(config, model=replace(config.model, args=overrides))
    model = make_whole_model(spec, model_args_of(small, spec, config.training.seq_len), small)
    free = {name for name, _ in trainable([model])}
    for table in config.optimizer.group:
        match = [pattern for pattern in table.match if filter_names(free, pattern)]
        if match:
            left.append(replace(table, match=match))
        free -= {name for pattern in match for name in filter_names(free, pattern)}
    return left


def _parallelism(parallelism: Parallelism, world: World, stages: Stages) -> Parallelism:
    d = world.degrees
    several = d.ep * d.etp > 1
    one_stage = d.pp == 1
    return replace(
        parallelism,
        pipeline_parallel_degree=d.pp,
        data_parallel_replicate_degree=d.dp_replicate,
        data_parallel_shard_degree=d.dp_shard,
        context_parallel_degree=d.cp,
        tensor_parallel_degree=d.tp,
        expert_parallel_degree=d.ep,
        expert_tensor_parallel_degree=d.etp,
        expert_parallel_node_size=world.node_size if several else None,
        enable_async_tensor_parallel=False,
        pipeline_parallel_microbatch_size=min(2, parallelism.pipeline_parallel_microbatch_size),
        **({} if one_stage else _stages(parallelism, stages)),
    )


def _stages(parallelism: Parallelism, stages: Stages) -> dict[str, Any]:
    told = parallelism.pipeline_parallel_layers_per_stage is not None
    return {
        "module_fqns_per_model_part": stages.modules,
        "pipeline_parallel_first_stage_less_layers": stages.first_less,
        "pipeline_parallel_last_stage_less_layers": stages.last_less,
        "pipeline_parallel_layers_per_stage": stages.per_stage if told else None,
    }


def _on_this_machine(config: JobConfig, steps: int) -> JobConfig:
    """Switch off what needs a GPU, a compiler or a day; switch on checkpoints; set the seed."""
    ac = config.activation_checkpoint
    budget = ac.mode == "memory_budget"
    if ac.mode == "selective" and ac.selective_ac_option.isdecimal():
        ac = replace(ac, selective_ac_option=str(min(2, int(ac.selective_ac_option))))
    compiler = replace(config.compile, enable=budget, cuda_graph=False)
    if budget:
        compiler = replace(compiler, backend=BUDGETING, components=["model"])
    converters = [name for name in config.model.converters if name not in FLOAT8]
    return replace(
        config,
        model=replace(config.model, converters=converters),
        activation_checkpoint=replace(ac, visualize_memory_budget_pareto=False, debug=False),
        compile=compiler,
        optimizer=replace(config.optimizer, early_step_in_backward=False),
        checkpoint=Checkpoint(
            enable=True,
            interval=steps + 1,  # the proof says when
            last_save_model_only=False,
            async_mode=config.checkpoint.async_mode,
            keep_latest_k=0,
        ),
        validation=replace(config.validation, enable=False),
        metrics=Metrics(log_routing=True),
        profiling=Profiling(),
        comm=Comm(init_timeout_seconds=300, train_timeout_seconds=300),
        debug=Debug(seed=SEED, moe_force_load_balance=config.debug.moe_force_load_balance),
    )


def reference(small: JobConfig, world: World) -> JobConfig:
    """Return the same run on one process: the same batches, nothing split, nothing recomputed."""
    dp = world.dp_degree
    phases = [
        replace(phase, local_batch_size=phase.local_batch_size and phase.local_batch_size * dp)
        for phase in small.schedule.phase
    ]
    training = small.training
    return replace(
        small,
        training=replace(training, local_batch_size=training.local_batch_size * dp),
        schedule=replace(small.schedule, phase=phases),
        parallelism=Parallelism(),
        activation_checkpoint=replace(small.activation_checkpoint, mode="none"),
        # On where the layout compiles: then neither records outputs of layers (record.py).
        compile=replace(small.compile, components=[]),
    )
