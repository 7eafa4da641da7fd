"""Keys of torchtitan v0.1 to v0.3 that end here, with the reason. Those that moved:
torchtitan/config/moved_keys.py.
"""

_LOADER = "the loader has one way to wait, pin and fetch ahead here"
_CONTEXT = "context parallelism here has one way to split a sequence"
_FT = (
    "replicas that come and go (torchft) are not supported here; a run goes on from its last "
    "checkpoint after any failure, see docs/checkpoint.md"
)
_PROFILER = "traces here are taken every profile_freq steps, or on SIGUSR2"
_MX = "MX formats are not supported here"
_ESTIMATE = "scripts/plan.py says what a run needs"
_LOSS = "the loss follows from the model here"
# Reason for each key, or table, that is left out whatever its value.
LEFT_OUT = {
    "job.use_for_integration_test": "it is for torchtitan's own tests",
    "parallelism.enable_compiled_autograd": "backward passes are not compiled as a whole here",
    "float8.force_recompute_fp8_weight_in_bwd": "it changed no result",
    "mx": _MX,
    "quantize.linear.mx": _MX,
    "quantize.grouped_mm.mx": _MX,
    "fault_tolerance": _FT,
    "memory_estimation": _ESTIMATE,
    "training.dataloader": _LOADER,
    "validation.dataloader": _LOADER,
    "dataloader": _LOADER,
    "validator.dataloader": _LOADER,
    "parallelism.context_parallel_load_balancer": _CONTEXT,
    "parallelism.context_parallel_ptrr_mask_key": _CONTEXT,
    "parallelism.expert_parallel_comm_backend": (
        "parallelism.expert_parallel_dispatch chooses how tokens travel here"
    ),
    "parallelism.spmd_backend": "it changed no result",
    "parallelism.enable_fsdp_symm_mem": "it changed no result",
    "parallelism.enable_sequence_parallel": "it always goes with tensor parallelism here",
    "training.disable_cuda_graphs": "compile.cuda_graph switches them on here",
    "debug.spmd_typechecking": "it changed no result",
    "debug.detect_anomaly": "docs/debugging.md has the way here",
    "debug.batch_invariant": "it is for reinforcement learning",
    "debug.enable_structured_logging": "metrics.jsonl has the numbers here",
    "profiler.profiler_repeat": _PROFILER,
    "profiler.profiler_skip_first": _PROFILER,
    "profiler.profiler_skip_first_wait": _PROFILER,
    "profiler.memory_snapshot_freq": _PROFILER,
    "profiler.memory_snapshot_max_entries": _PROFILER,
    "profiler.trace_post_processor": _PROFILER,
    "override": "kernels are chosen by device here",
    "tokenizer": "the tokenizer follows from its folder here",
    "loss": _LOSS,
    "model_spec.model": "sizes come from the flavor and [model.args] here",
    "optimizer.optimizer_factory_kwargs_by_name": "an optimizer is one key here, optimizer.name",
}
# Tables of which a value that asks for something can't be left out: what it asks for.
REFUSED = {
    "experimental": ("", "runs code of yours, which has no place in a settings file here"),
    "job.custom_config_module": ("", "adds keys of yours; set model arguments in [model.args]"),
    "override.imports": ([], "replaces parts of the model by code of yours"),
}
