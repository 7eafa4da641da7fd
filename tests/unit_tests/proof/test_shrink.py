"""What shrinking keeps: schedules, losses, phases, recomputation, group limits; legal runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchtitan.config import ConfigManager, JobConfig, Phase, validate
from torchtitan.config.phases import run_schedule
from torchtitan.proof.plan import Plan, make_plan
from torchtitan.proof.report import changes, opening
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.trainer.preflight import check_pipeline, model_args_of

REPO = Path(__file__).parents[3]
# Shipped TOML: processes of the run it is for.
SHIPPED = {
    "debug_model": 2,
    "deepseek_v3_16b": 8,
    "deepseek_v3_671b": 2048,
    "deepseek_v3_671b_256xh200": 256,
    "deepseek_v3_671b_32k": 2048,
    "deepseek_v3_671b_128k": 2048,
    "moonlight_16b_a3b": 64,
}


def plan_of(folder: Path, size: int | None, *options: str, file: str = "") -> Plan:
    config = ConfigManager().parse_args(
        [*([f"--job.config_file={file}"] if file else []), *options]
    )
    return make_plan(config, size, node_size=8, most=16, folder=folder)


def args_of(config: JobConfig):
    spec = get_train_spec(config.model.name)
    return model_args_of(config, spec, config.training.seq_len)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_shrink_to_runs_that_are_legal(name, tmp_path):
    file = str(REPO / f"train_configs/{name}.toml")
    plan = plan_of(tmp_path, SHIPPED[name], file=file)
    assert plan.runs and not plan.missing
    for run in plan.runs:
        for config, size in ((run.small, run.world.size), (run.alone, 1)):
            validate(config, size, "cpu")
            args = args_of(config)
            args.check_layout(config.parallelism)
            check_pipeline(config, args)
            assert args.num_weights < 300_000
            schedule = run_schedule(config, run.world.dp_degree if size > 1 else 1)
            assert len(schedule.phases) == len(plan.config.schedule.phase)
            assert config.training.steps == max(3, schedule.num_steps() if schedule.phases else 0)
        assert run.small.optimizer.state_dtype == plan.config.optimizer.state_dtype
        assert run.small.activation_checkpoint.mode == plan.config.activation_checkpoint.mode
    assert any("model.args.dim" in line for line in opening(plan))


def test_v3_keeps_its_recipe(tmp_path):
    file = str(REPO / "train_configs/deepseek_v3_671b.toml")
    plan = plan_of(tmp_path, 2048, file=file)
    (run,) = plan.runs
    args, phases = args_of(run.small), run.small.schedule.phase
    assert args.n_mtp_layers == 1 and args.q_lora_rank > 0 and not args.use_yarn
    assert 1 <= args.moe_args.num_limited_groups < args.moe_args.num_expert_groups
    assert run.small.parallelism.pipeline_parallel_schedule == "1F1B"
    assert run.small.parallelism.expert_parallel_dispatch == "node_limited"
    ends = run_schedule(run.small, run.world.dp_degree).ends
    assert ends[1].batch_size > ends[0].batch_size
    assert ends[2].local_batch_size > ends[1].local_batch_size
    assert [phase.lr_shape for phase in phases] == [p.lr_shape for p in plan.config.schedule.phase]
    assert phases[3].load_balance_coeff == 0.0 and phases[2].mtp_loss_weight == 0.1
    assert "parallelism.pipeline_parallel_degree" in changes(plan, run)


@pytest.mark.parametrize(
    ("seq_len", "yarn"), [(2048, False), (4096, False), (32768, True), (131072, True)]
)
def test_yarn_stays_as_it_is(tmp_path, seq_len, yarn):
    plan = plan_of(tmp_path, 2, f"--training.seq_len={seq_len}", "--model.flavor=16B")
    assert args_of(plan.runs[0].small).use_yarn == yarn == plan.args.use_yarn


def test_with_a_memory_budget_neither_run_records_outputs(tmp_path):
    options = ["--activation_checkpoint.mode=memory_budget", "--training.dataset=sample"]
    (run,) = plan_of(tmp_path, 2, "--model.flavor=16B", "--compile.enable", *options).runs
    assert run.small.compile.enable and run.small.compile.components == ["model"]
    assert run.alone.compile.enable and run.alone.compile.components == []
    (run,) = plan_of(tmp_path, 2, "--model.flavor=16B", "--compile.enable", options[1]).runs
    assert not run.small.compile.enable and not run.alone.compile.enable


def test_lengths_and_batches_of_phases_keep_their_order(tmp_path):
    phases = [
        Phase(tokens=1e6, batch_size=16),
        Phase(tokens=1e6, seq_len=8192, local_batch_size=2, yarn="on"),
        Phase(tokens=1e6, batch_size=32, batch_size_shape="linear", batch_size_step=8),
        Phase(tokens=1e6, lr=1e-5, lr_shape="cosine"),
    ]
    config = ConfigManager().parse_args(["--model.flavor=671B", "--training.seq_len=4096"])
    config = replace(
        config,
        schedule=replace(config.schedule, phase=phases),
        training=replace(config.training, dataset="sample", local_batch_size=4),
    )
    (run,) = make_plan(config, 4, node_size=8, most=16, folder=tmp_path).runs
    ends = run_schedule(run.small, 4).ends
    assert [end.seq_len for end in ends] == [16, 16, 32, 32, 32]
    assert [end.local_batch_size for end in ends] == [4, 4, 2, 2, 2]
    assert ends[3].batch_size > ends[2].batch_size
    validate(run.small, 4, "cpu")
    validate(run.alone, 1, "cpu")


@pytest.mark.parametrize(
    "schedule", ["1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "DualPipeV"]
)
def test_pipelines_keep_schedule_and_uneven_ends(tmp_path, schedule):
    if schedule in ("InterleavedZeroBubble", "DualPipeV") and torch.__version__ < "2.13":
        pytest.skip("schedules that split backward passes are refused")
    options = [
        "--model.flavor=671B",
        "--parallelism.pipeline_parallel_degree=8",
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        "--parallelism.pipeline_parallel_first_stage_less_layers=0",
        "--training.local_batch_size=32",
        "--training.dataset=sample",
    ]
    plan = plan_of(tmp_path, 64, *options)
    for run in plan.runs:
        assert run.small.parallelism.pipeline_parallel_schedule == schedule
        assert run.small.parallelism.pipeline_parallel_first_stage_less_layers == 0
        assert run.small.parallelism.pipeline_parallel_last_stage_less_layers == 1
        check_pipeline(run.small, args_of(run.small))


def test_listed_parts_are_renumbered(tmp_path):
    listed = [["tok_embeddings", "layers.0", "layers.1"]]
    listed += [[f"layers.{3 * n + 2 + k}" for k in range(3)] for n in range(6)]
    listed += [[f"layers.{n}" for n in range(20, 27)] + ["norm", "output"]]
    options = ["--model.flavor=16B", "--parallelism.pipeline_parallel_degree=8"]
    config = ConfigManager().parse_args([*options, "--training.dataset=sample"])
    parts = replace(config.parallelism, module_fqns_per_model_part=listed)
    config = replace(config, parallelism=parts)
    plan = make_plan(config, 64, node_size=8, most=8, folder=tmp_path)
    with_pipeline = next(run for run in plan.runs if run.world.degrees.pp == 2)
    assert with_pipeline.small.parallelism.module_fqns_per_model_part == [
        ["tok_embeddings", "layers.0", "layers.1"],
        ["layers.2", "layers.3", "norm", "output"],
    ]


def test_data_that_is_here_is_read_and_other_data_replaced(tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"text": "one word and another"}\n' * 40)
    here = plan_of(tmp_path, 2, "--training.dataset=text", f"--training.dataset_path={mine}")
    assert here.replaced == []
    assert "one word" in Path(here.runs[0].small.training.dataset_path).read_text()
    gone = plan_of(tmp_path, 2, "--training.dataset=text", "--training.dataset_path=/not/here/*.gz")
    assert gone.replaced == [
        "training.dataset_path /not/here/*.gz is not on this machine: the shipped sample takes its "
        "place"
    ]
    assert plan_of(tmp_path, 2, "--training.dataset=c4").replaced[0].startswith("training.dataset")


def test_patterns_of_layers_that_are_gone_are_left_out(tmp_path):
    table = '[{match = ["layers.20.*", "*norm.weight"], weight_decay = 0.5}]'
    options = ["--model.flavor=16B", "--training.dataset=sample", f"--optimizer.group={table}"]
    (run,) = plan_of(tmp_path, 2, *options).runs
    assert [group.match for group in run.small.optimizer.group] == [["*norm.weight"]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--training.dataset=c5"], "training.dataset = 'c5' is not known"),
        (["--parallelism.expert_parallel_degree=3"], "expert_parallel_degree = 3 must divide"),
        (["--model.flavor=672B"], "model.flavor '672B' is not a flavor"),
        (["--training.global_batch_size=7"], "training.global_batch_size = 7 must be"),
    ],
)
def test_illegal_files_are_refused_before_anything_starts(tmp_path, options, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_of(tmp_path, 8, *options)
