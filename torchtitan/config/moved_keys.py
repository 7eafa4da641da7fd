"""Keys of torchtitan's settings that have another name here, in any of v0.1 to v0.3.

Versions are those of the published packages 0.1.0, 0.2.0, 0.2.2 and 0.3.0, and of the files between
0.1 and 0.2 that already have deepseek_v3. v0.3 reads no TOML: its names are those of its command
line and of the JSON that it saves.
"""

# Our name of each key that moved.
MOVED = {
    # v0.1, and until v0.2
    "job.print_args": "job.print_config",
    "model.tokenizer_path": "model.hf_assets_path",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.batch_size": "training.local_batch_size",
    "training.compile": "compile.enable",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.last_save_in_safetensors_format": "checkpoint.last_save_in_hf",
    "float8.moe_fqns_prototype": "quantize.grouped_mm.float8.fqns",
    # v0.2.2
    "training.dataloader.num_workers": "training.dataset_num_workers",
    # v0.3
    "dump_folder": "job.dump_folder",
    "hf_assets_path": "model.hf_assets_path",
    "model_spec.name": "model.name",
    "model_spec.flavor": "model.flavor",
    "dataloader.dataset": "training.dataset",
    "dataloader.dataset_path": "training.dataset_path",
    "dataloader.num_workers": "training.dataset_num_workers",
    "validator.dataloader.dataset": "validation.dataset",
    "validator.dataloader.dataset_path": "validation.dataset_path",
    "compile.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "debug.print_config": "job.print_config",
    "debug.save_config_file": "job.save_config_file",
    "activation_checkpoint.force_recompute_mm_shapes_by_fqns": (
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns"
    ),
}
# The same for whole tables; a key of MOVED comes first.
MOVED_TABLES = {
    "float8": "quantize.linear.float8",
    "profiler": "profiling",
    "validator": "validation",
}
