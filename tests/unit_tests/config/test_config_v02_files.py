"""A DeepSeek-V3 TOML written for torchtitan v0.2 loads unchanged and means the same."""

from pathlib import Path

import pytest
import tomli

from torchtitan.config import ConfigManager, JobConfig, to_dict, validate

V02 = Path(__file__).parent / "v02"

# Keys whose v0.2 default is None, which TOML cannot write.
UNSET = {
    "job.config_file",
    "job.save_config_file",
    "model.tokenizer_path",
    "lr_scheduler.decay_ratio",
    "training.dataset_path",
    "parallelism.module_fqns_per_model_part",
    "parallelism.pipeline_parallel_layers_per_stage",
    "checkpoint.initial_load_path",
    "quantize.linear.float8.recipe_name",
    "validation.dataset_path",
    "debug.seed",
}
OURS = {
    "job.check_config",
    "ema.decay",
    "ema.enable",
    "ema.interval",
    "ema.start_step",
    "lora.alpha",
    "lora.fqns",
    "lora.initial_load_path",
    "lora.override",
    "lora.rank",
    "lora.save_merged",
    "model.args",
    "quantize.grouped_mm.float8.dispatch",
    "quantize.linear.float8.gradient_dtype",
    "quantize.linear.float8.head",
    "optimizer.group",
    "optimizer.muon_adjust",
    "optimizer.muon_momentum",
    "optimizer.state_dtype",
    "optimizer.weight_decay_on",
    "schedule.phase",
    "training.blend",
    "training.dataset_text_key",
    "training.format",
    "chat.template",
    "chat.template_kwargs",
    "chat.turns",
    "chat.train_reasoning",
    "chat.train_tool_calls",
    "chat.too_long",
    "chat.look_ahead",
    "chat.loss_weight",
    "training.fim_rate",
    "training.fim_tokens",
    "training.dataset_num_workers",
    "training.dataset_lanes",
    "training.non_finite_loss",
    "metrics.alarm",
    "metrics.enable_report",
    "metrics.log_routing",
    "metrics.routing_moved_freq",
    "training.loss_spike",
    "training.loss_spike_factor",
    "training.trainable_fqns",
    "training.frozen_fqns",
    "metrics.log_traffic",
    "metrics.waiting_freq",
    "compile.cuda_graph",
    "validation.dataset_text_key",
    "validation.format",
    "validation.sets",
    "validation.sample_prompts",
    "validation.sample_tokens",
    "parallelism.expert_parallel_dispatch",
    "parallelism.expert_parallel_capacity",
    "parallelism.expert_parallel_node_size",
}


def load(name: str, *options: str) -> JobConfig:
    return ConfigManager().parse_args(["--job.config_file", str(V02 / name), *options])


def flat(table: dict, at: str = "") -> dict:
    result = {}
    for name, value in table.items():
        if isinstance(value, dict) and f"{at}{name}" not in ("model.args", "chat.template_kwargs"):
            result |= flat(value, f"{at}{name}.")
        else:
            result[at + name] = value
    return result


def test_keys_are_those_of_v02_and_ours_at_their_defaults():
    theirs = flat(tomli.loads((V02 / "all_defaults.toml").read_text()))
    mine = flat(to_dict(JobConfig()))
    assert set(mine) == set(theirs) | UNSET | OURS
    differing = {key for key, value in theirs.items() if mine[key] != value}
    # Overlap costs time where ranks are close together (docs/parallelism.md).
    overlap = "parallelism.pipeline_parallel_expert_parallel_overlap"
    assert differing == {"model.name", overlap}
    assert {key for key in UNSET if mine[key] is not None} == {"job.save_config_file"}


@pytest.mark.parametrize("name", ["all_defaults", "debug_model", "16b", "671b"])
def test_v02_file_means_what_it_says(name):
    config = flat(to_dict(load(f"{name}.toml")))
    written = flat(tomli.loads((V02 / f"{name}.toml").read_text()))
    assert {key: config[key] for key in written} == written
    defaults = flat(to_dict(JobConfig())) | {"job.config_file": str(V02 / f"{name}.toml")}
    rest = set(defaults) - set(written)
    assert {key: config[key] for key in rest} == {key: defaults[key] for key in rest}


def test_integer_for_a_number_becomes_a_float():
    max_norm = load("debug_model.toml").training.max_norm  # the file says 1
    assert max_norm == 1.0 and type(max_norm) is float


@pytest.mark.parametrize(
    "name, world_size", [("all_defaults", 1), ("debug_model", 2), ("671b", 2048)]
)
def test_v02_file_runs_at_once(name, world_size):
    validate(load(f"{name}.toml"), world_size)


def test_v02_16b_runs_with_its_expert_parallelism():
    config = load("16b.toml")
    assert config.parallelism.expert_parallel_degree == 8
    validate(config, 8, "cuda")
