"""What a config may hold: each rule with its sentence, and what has no effect stays allowed."""

import math

import pytest

from torchtitan.config import JobConfig, resolve_global_batch_size, validate
from torchtitan.config.schema import build
from torchtitan.tools.errors import UserError

NAN, INF = float("nan"), math.inf


def refusal(world_size: int = 1, device_type: str = "cpu", **values) -> str:
    """The sentence for a config with these settings; `training__steps=3` is training.steps."""
    config = build({key.replace("__", "."): value for key, value in values.items()})
    with pytest.raises(UserError) as error:
        validate(config, world_size, device_type)
    return str(error.value)


def accept(world_size: int = 1, device_type: str = "cpu", **values) -> None:
    config = build({key.replace("__", "."): value for key, value in values.items()})
    validate(config, world_size, device_type)


@pytest.mark.parametrize("world_size", [1, 2, 7, 2048])
def test_defaults_are_fine_for_any_number_of_processes(world_size):
    accept(world_size)


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        (
            "comm.mode",
            "local_tensor",
            'the local-tensor mode; "local_tensor"; "default" or "fake_backend"',
        ),
    ],
)
def test_feature_that_is_not_there_yet_is_refused(key, value, sentence):
    feature, shown, way_out = sentence.split("; ")
    assert refusal(8, **{key: value}) == (
        f"{feature} is not supported yet, but {key} = {shown}; set it to {way_out}."
    )


def test_a_memory_budget_needs_a_compiler_that_keeps_to_it():
    budget = {"activation_checkpoint__mode": "memory_budget"}
    accept(compile__enable=True, **budget)
    accept(
        compile__enable=True,
        compile__backend="aot_eager_decomp_partition",
        activation_checkpoint__visualize_memory_budget_pareto=True,
        **budget,
    )
    sentence = (
        'activation_checkpoint.mode = "memory_budget" is implemented by the compiler: it needs '
        'compile.enable with "model" in compile.components; set them, or another mode.'
    )
    assert refusal(**budget) == sentence
    assert refusal(compile__enable=True, compile__components=["loss"], **budget) == sentence
    assert refusal(compile__enable=True, compile__backend="eager", **budget) == (
        'compile.backend = "eager" doesn\'t choose what is recomputed, which '
        'activation_checkpoint.mode "memory_budget" needs; set it to "inductor".'
    )
    assert refusal(activation_checkpoint__memory_budget=1.5) == (
        "activation_checkpoint.memory_budget = 1.5 must be between 0 and 1."
    )
    assert refusal(activation_checkpoint__visualize_memory_budget_pareto=True) == (
        "activation_checkpoint.visualize_memory_budget_pareto = true draws the "
        'choices of activation_checkpoint.mode "memory_budget", but the mode is "selective"; '
        "change one of them."
    )


def test_cpu_offload_needs_an_accelerator_and_fsdp():
    accept(2, "cuda", training__enable_cpu_offload=True)
    for world_size, device, reason in (
        (2, "cpu", "moves weights from an accelerator to the CPU, but this run is on the CPU"),
        (1, "cuda", "needs FSDP, which one process doesn't use"),
    ):
        assert refusal(world_size, device, training__enable_cpu_offload=True) == (
            f"training.enable_cpu_offload = true {reason}; set it to false."
        )


def test_keys_without_effect_may_hold_anything():
    accept(
        parallelism__pipeline_parallel_schedule="Interleaved1F1B",
        parallelism__pipeline_parallel_microbatch_size=4,
        parallelism__context_parallel_rotate_method="alltoall",
        parallelism__disable_loss_parallel=True,
        checkpoint__interval=1,
        checkpoint__async_mode="async",
        checkpoint__initial_load_path="somewhere",
        validation__steps=0,
        activation_checkpoint__memory_budget=0.1,
        quantize__linear__float8__recipe_name="rowwise",
        quantize__grouped_mm__float8__fqns=["experts"],
    )


def test_supported_choices_are_accepted():
    for mode in ("none", "full", "selective"):
        for option in ("op", "1", "12"):
            accept(
                activation_checkpoint__mode=mode, activation_checkpoint__selective_ac_option=option
            )
    for check in ("default", "none"):
        accept(activation_checkpoint__determinism_check=check)
    for components in ([], ["loss"], ["model"], ["loss", "model"]):
        accept(compile__components=components)
    accept(comm__mode="fake_backend", compile__backend="aot_eager", training__max_norm=INF)
    accept(lr_scheduler__decay_ratio=0.0, lr_scheduler__min_lr_factor=1.0, debug__seed=2**63 - 1)


def test_names_that_torchtitan_had_say_what_took_their_place():
    assert refusal(model__tokenizer_path="./tok") == (
        'model.tokenizer_path = "./tok" has a new name; '
        "set model.hf_assets_path to the folder that holds the tokenizer."
    )
    assert refusal(job__custom_config_module="my.config") == (
        'job.custom_config_module = "my.config" is not supported; set model arguments in '
        "[model.args] and leave it empty."
    )


@pytest.mark.parametrize(
    "rule, keys, wrong",
    [
        (
            "1 or more",
            "training.local_batch_size training.seq_len training.steps training.gc_freq "
            "training.dataset_lanes "
            "metrics.log_freq profiling.profile_freq profiling.profiler_active "
            "comm.init_timeout_seconds comm.train_timeout_seconds",
            [0, -1],
        ),
        (
            "0 or more",
            "lr_scheduler.warmup_steps training.dataset_num_workers profiling.profiler_warmup "
            "comm.trace_buf_size",
            [-1],
        ),
        ("a finite number, 0 or more", "optimizer.lr optimizer.weight_decay", [-0.1, INF, NAN]),
        ("a finite number greater than 0", "optimizer.eps", [0.0, -1.0, INF, NAN]),
        ("greater than 0 (inf switches clipping off)", "training.max_norm", [0.0, -1.0, NAN]),
        ("at least 0 and less than 1", "optimizer.beta1 optimizer.beta2", [1.0, -0.1, NAN]),
        (
            "between 0 and 1",
            "lr_scheduler.decay_ratio lr_scheduler.min_lr_factor",
            [-0.1, 1.1, NAN],
        ),
        ("between 0 and 2**63 - 1", "debug.seed", [-1, 2**63]),
        (
            "a name, not empty",
            "job.dump_folder job.save_config_file model.name model.flavor training.dataset "
            "training.dataset_text_key compile.backend",
            ["", " "],
        ),
    ],
)
def test_value_out_of_range_is_refused(rule, keys, wrong):
    for key in keys.split():
        for value in wrong:
            sentence = refusal(**{key: value})
            assert sentence.startswith(f"{key} = ") and sentence.endswith(f" must be {rule}.")


def test_wrong_choices_are_refused_with_the_right_ones():
    assert refusal(compile__components=["model", "los"]) == (
        "compile.components names 'los', which cannot be compiled; did you mean 'loss'?"
    )
    for option in ("0", "-1", "ops", "", "1.5"):
        assert refusal(activation_checkpoint__selective_ac_option=option) == (
            f'activation_checkpoint.selective_ac_option = "{option}" must be "op", "elementwise" '
            'or a positive integer as a string, such as "2".'
        )
    assert refusal(activation_checkpoint__determinism_check="strict") == (
        'activation_checkpoint.determinism_check = "strict" must be "default" or "none".'
    )


def test_profiling_needs_room_for_a_trace_and_cuda_for_snapshots():
    values = dict(profiling__profile_freq=3, profiling__profiler_warmup=2)
    accept(**values, profiling__profiler_active=2)
    accept(**values, profiling__profiler_active=1, profiling__enable_profiling=True)
    assert refusal(
        **values, profiling__profiler_active=2, profiling__enable_profiling=True
    ) == (
        "profiling.profile_freq = 3 is shorter than one trace, profiler_warmup (2) + "
        "profiler_active (2); set it to 4 or more."
    )  # fmt: skip
    accept(device_type="cuda", profiling__enable_memory_snapshot=True)
    assert refusal(profiling__enable_memory_snapshot=True) == (
        "profiling.enable_memory_snapshot = true needs a CUDA GPU, but this run is on cpu; "
        "set it to false."
    )


# ---------------------------------------------------------------------------------------------
# Batch size
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted, sentence_end",
    [(20, "set it to 16 or 24."), (7, "set it to 8."), (0, "set it to 8."), (-8, "set it to 8.")],
)
def test_global_batch_size_names_the_nearest_multiples(wanted, sentence_end):
    sentence = refusal(2, training__local_batch_size=4, training__global_batch_size=wanted)
    assert sentence == (
        f"training.global_batch_size = {wanted} must be -1 or a multiple of 8, "
        f"training.local_batch_size (4) x the data-parallel degree (2); {sentence_end}"
    )


def test_global_batch_size_resolves():
    config = JobConfig()
    assert resolve_global_batch_size(config, 4) == config.training.local_batch_size * 4
    wide = build({"training.local_batch_size": 2, "training.global_batch_size": 24})
    assert resolve_global_batch_size(wide, 3) == 24


# ---------------------------------------------------------------------------------------------
# One process only
# ---------------------------------------------------------------------------------------------

EARLY = {"optimizer__early_step_in_backward": True, "training__max_norm": INF}


def test_an_early_step_needs_what_it_can_keep():
    accept(1, **EARLY)
    accept(1, **EARLY, training__non_finite_loss="rewind", checkpoint__enable=True)
    for key, value, way_out in [
        ("training__max_norm", 1.0, "inf"),
        ("training__non_finite_loss", "skip_step", '"stop"'),
        ("training__global_batch_size", 16, "8"),
        ("optimizer__implementation", "foreach", '"fused"'),
    ]:
        sentence = refusal(1, **EARLY | {key: value})
        assert sentence.startswith(key.replace("__", ".") + " = ")
        assert f"set it to {way_out}, or early_step_in_backward to false." in sentence
    assert "works on one process, but this run has 2" in refusal(2, **EARLY)


def test_a_cuda_graph_is_for_gpus_and_passes_that_stay_the_same():
    graph = {"compile__cuda_graph": True}
    accept(1, "cuda", **graph)
    accept(4, "cuda", **graph, parallelism__expert_parallel_degree=4)
    accept(1, "cuda", **graph, training__global_batch_size=16)
    accept(2, "cuda", **graph, parallelism__context_parallel_degree=2)
    assert "this run is on cpu" in refusal(1, "cpu", **graph)
    for key, value in {
        "parallelism__pipeline_parallel_degree": 2,
        "training__enable_cpu_offload": True,
    }.items():
        sentence = refusal(2, "cuda", **graph, **{key: value})
        assert sentence.startswith("compile.cuda_graph = true is for CUDA GPUs and passes")
        assert key.replace("__", ".") in sentence and sentence.endswith("; set it to false.")
