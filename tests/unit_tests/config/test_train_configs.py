"""The shipped TOMLs are good ones, for as many processes as their first lines say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchtitan.config import ConfigManager, JobConfig, resolve_degrees, to_dict, validate
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_flavor, get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.trainer.preflight import check_config, pipeline_plan

FOLDER = Path(__file__).parents[3] / "train_configs"


@pytest.mark.parametrize(
    "name, processes",
    [
        ("debug_model", 2),
        ("chat_debug_model", 2),
        ("deepseek_v3_16b", 8),
        ("moonlight_16b_a3b", 8),
        ("moonlight_16b_a3b_chat", 8),
        ("moonlight_16b_a3b_lora", 1),
        ("qwen3_30b_a3b_chat", 8),
        ("qwen3_30b_a3b_lora", 2),
    ],
)
def test_a_shipped_config_is_accepted(name, processes):
    config = ConfigManager().parse_args(["--job.config_file", str(FOLDER / f"{name}.toml")])
    validate(config, processes)
    spec = get_train_spec(config.model.name)
    args = get_flavor(spec, config.model.name, config.model.flavor).for_run(
        overrides=config.model.args, seq_len=config.training.seq_len
    )
    args.check_expert_parallel(config.parallelism.expert_parallel_degree)
    if config.checkpoint.last_save_in_hf:
        spec.state_dict_adapter(args).check_export()


# ---------------------------------------------------------------------------------------------
# The layouts of DeepSeek-V3
# ---------------------------------------------------------------------------------------------

LAYOUTS_671B = [("deepseek_v3_671b", 2048), ("deepseek_v3_671b_256xh200", 256)]


def checked_671b(name: str, processes: int, monkeypatch) -> tuple[JobConfig, BaseModelArgs]:
    """The config and the model's arguments, once all checks before a start are passed."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    # In place of what has to be downloaded, and of 8 GPUs.
    here = ["--model.hf_assets_path=tests/assets/tokenizer", "--training.dataset=sample"]
    here.append("--training.fim_rate=0")
    config = ConfigManager().parse_args([f"--job.config_file={FOLDER / name}.toml", *here])
    monkeypatch.setattr("torchtitan.trainer.preflight.check_local_processes", lambda _: None)
    _, model_args, _ = check_config(config)
    return config, model_args


@pytest.mark.parametrize(("name", "processes"), LAYOUTS_671B)
def test_a_671b_layout_is_accepted_with_a_group_of_experts_a_node(name, processes, monkeypatch):
    config, args = checked_671b(name, processes, monkeypatch)
    degrees = resolve_degrees(config.parallelism, processes)
    assert degrees.ep == 64 == 8 * args.moe_args.num_expert_groups
    assert config.parallelism.expert_parallel_dispatch == "node_limited"
    plan = pipeline_plan(config, args)
    layers = [sum(name.startswith("layers.") for name in stage) for stage in plan.stages]
    per_stage = {16: 4, 8: 8}[len(plan.stages)]
    assert layers == [per_stage] * (len(layers) - 1) + [per_stage - 3]
    assert plan.num_microbatches * degrees.dp_shard == config.training.global_batch_size


@pytest.mark.parametrize(("name", "processes"), LAYOUTS_671B)
def test_a_671b_file_says_the_memory_that_its_weights_need(name, processes, monkeypatch):
    config, args = checked_671b(name, processes, monkeypatch)
    degrees, plan = resolve_degrees(config.parallelism, processes), pipeline_plan(config, args)
    with torch.device("meta"):
        model = get_train_spec(config.model.name).model_cls(args)
    whole, shards = [0.0] * degrees.pp, [0.0] * degrees.pp  # weights of each pipeline rank
    for stage, modules in enumerate(plan.stages):
        modules += ("mtp",) if stage == len(plan.stages) - 1 else ()
        for path, parameter in model.named_parameters():
            if not any(path.startswith(f"{module}.") for module in modules):
                continue
            ep = degrees.ep if ".experts." in path else 1
            whole[plan.rank_of(stage)] += parameter.numel() / ep
            shards[plan.rank_of(stage)] += parameter.numel() / degrees.dp_shard
    # FSDP splits the experts of an EP rank over dp_shard / ep ranks, so by dp_shard in all, too.
    most = max(6 * here + 12 * shard for here, shard in zip(whole, shards, strict=True))
    head = (FOLDER / f"{name}.toml").read_text().partition("[job]")[0].replace("\n# ", " ")
    assert f"{max(whole) / 1e9:.2f} B weights" in head
    assert f"Together {most / 1e9:.1f} GB" in head


def test_the_ramp_of_the_671b_recipe_is_too_small_for_dualpipev(monkeypatch):
    config, args = checked_671b("deepseek_v3_671b", 2048, monkeypatch)
    v_shaped = replace(config.parallelism, pipeline_parallel_schedule="DualPipeV")
    v_shaped = replace(v_shaped, pipeline_parallel_last_stage_less_layers=1)
    with pytest.raises(UserError, match=r"at least as many as stages \(32\) .* makes 24"):
        pipeline_plan(replace(config, parallelism=v_shaped), args)


@pytest.mark.parametrize(("name", "cp"), [("671b_32k", 8), ("671b_128k", 32)])
def test_a_longer_context_keeps_the_layout_and_the_tokens_of_a_gpu(name, cp, monkeypatch):
    config, args = checked_671b(f"deepseek_v3_{name}", 2048, monkeypatch)
    short = ConfigManager().parse_args([f"--job.config_file={FOLDER}/deepseek_v3_671b.toml"])
    degrees, plan = resolve_degrees(config.parallelism, 2048), pipeline_plan(config, args)
    assert (degrees.cp, degrees.ep, degrees.pp) == (cp, 64, 16)
    assert config.training.seq_len // cp == short.training.seq_len
    assert plan.stages == pipeline_plan(short, args).stages
    assert plan.num_microbatches * degrees.dp_shard == config.training.global_batch_size


def test_both_671b_files_have_one_recipe():
    one, other = (
        to_dict(ConfigManager().parse_args([f"--job.config_file={FOLDER / name}.toml"]))
        for name, _ in LAYOUTS_671B
    )
    for table in (one, other):
        del table["job"], table["parallelism"], table["training"]["local_batch_size"]
        for phase in table["schedule"]["phase"]:
            del phase["local_batch_size"]
    assert one == other
