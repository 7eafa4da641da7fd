"""Plans against what was measured, torch's own counter, and arithmetic."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.scripts import SCRIPTS, script
from torchtitan.config import ConfigManager
from torchtitan.planning.advice import nearest_fit
from torchtitan.planning.closed import closed_state
from torchtitan.planning.hardware import TABLE, find_hardware
from torchtitan.planning.page import page
from torchtitan.planning.pipeline import actions_of, idle, length, play
from torchtitan.planning.plan import Plan, make_plan
from torchtitan.planning.ranks import built_rank, plan_run
from torchtitan.planning.report import as_data, table
from torchtitan.planning.routing import route
from torchtitan.planning.state import state_of
from torchtitan.planning.timing import step_time
from torchtitan.planning.trace import trace_run
from torchtitan.planning.traffic import gather_bytes
from torchtitan.tools.errors import UserError

presets = script("benchmarks/presets.py")
GIB = 2**30
DEBUG = ["--model.flavor=debugmodel", "--training.seq_len=128", "--training.local_batch_size=2"]


def plan(*options: str, world_size: int = 1, hardware: str = "h200", skew: float = 1.0) -> Plan:
    config = ConfigManager().parse_args(list(options))
    return make_plan(config, world_size, find_hardware(hardware), skew=skew)


@pytest.mark.parametrize(
    ("preset", "options", "measured"),
    [
        ("16b8-b4-fp32", [], 74.7),
        ("16b8-b8-bf16", [], 54.1),
        ("16b8-b4-fp32-docs", [], 76.2),
        ("16b8-b4-fp32", ["--training.global_batch_size=16"], 91.5),
        ("16b8-b4-bf16", ["--activation_checkpoint.mode=full"], 36.3),
        ("671b3-b4-bf16", [], 56.5),
    ],
)
def test_memory_is_that_of_measured_rows(preset: str, options: list[str], measured: float) -> None:
    """docs/performance.md, one H200."""
    found = plan(*presets.PRESETS[preset], *presets.NO_FILES, *options)
    assert found.worst.peak.total / GIB == pytest.approx(measured, rel=0.03)


def test_memory_of_two_gpus_is_that_of_the_measured_row() -> None:
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    found = plan(*options, "--parallelism.expert_parallel_degree=2", world_size=2)
    # Measured before experts were one operator there. Of each of 7 layers it keeps tokens (nearly
    # all of both ranks) in place of their rows, and no activations, which it computes again.
    tokens, D, F = 2 * 4 * 4096, 2048, 1408
    rows = tokens // 2 * 6
    saved = 7 * 2 * (rows * (D + F) - tokens * D)
    assert found.worst.peak.total / GIB == pytest.approx(48.5 - saved / GIB, rel=0.03)


def test_flops_are_those_of_torchs_counter() -> None:
    options = [*DEBUG, "--activation_checkpoint.mode=none"]
    config = ConfigManager().parse_args(options)
    run = plan_run(config, 1, gpus_per_node=8)
    kinds = {"gemm": 0, "grouped": 0}
    for part in trace_run(run, 1.0).of_layer.values():
        for kind in kinds:
            kinds[kind] += part.forward.flops[kind] + part.backward.flops[kind]
    moe_args = replace(run.model_args.moe_args, use_grouped_mm=False)
    model = run.spec.model_cls(replace(run.model_args, moe_args=moe_args))
    model.init_weights()
    tokens = torch.randint(0, 100, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if "mm" in str(op))
    assert sum(kinds.values()) == pytest.approx(products, rel=0.02)


def test_flops_are_those_of_mfu() -> None:
    """But for the router's gradient in two parts, and attention's fifth product backward."""
    run = plan_run(
        ConfigManager().parse_args([*DEBUG, "--activation_checkpoint.mode=none"]),
        1,
        gpus_per_node=8,
    )
    total = 0.0
    for part in trace_run(run, 1.0).of_layer.values():
        total += part.forward.flops.total() + part.backward.flops.total()
        total -= 0.5 * part.forward.flops["attention"]
    expected = run.tokens_per_step * run.model_args.train_flops_per_token(128)
    assert total == pytest.approx(expected, rel=0.02)


PIPELINE = [
    "--model.flavor=671B",
    "--model.args.n_layers=8",
    "--model.args.n_dense_layers=1",
    "--model.args.n_mtp_layers=1",
    "--training.seq_len=4096",
    "--training.local_batch_size=8",
    "--activation_checkpoint.mode=full",
    "--parallelism.pipeline_parallel_degree=4",
    "--parallelism.expert_parallel_degree=16",
    "--compile.enable",
]


@pytest.fixture(scope="module")
def pipelined() -> Plan:
    return plan(*PIPELINE, world_size=64, hardware="h100")


def check_arithmetic(whole: Plan) -> None:
    for rank in whole.memory:
        place = rank.rank // whole.run.stage_size
        closed = closed_state(whole.run, whole.traces, place)
        for name in ("parameters", "gradients", "optimizer", "copies"):
            assert getattr(closed, name) == pytest.approx(getattr(rank.state, name), rel=0.01), name


def test_arithmetic_agrees_with_the_count_of_the_real_model(pipelined: Plan) -> None:
    check_arithmetic(pipelined)


MOONLIGHT_LORA = f"--job.config_file={SCRIPTS.parent}/train_configs/moonlight_16b_a3b_lora.toml"


def test_state_of_adapters_is_that_of_the_page() -> None:
    """docs/finetuning.md: 2 P + 16 a bytes."""
    run = plan_run(ConfigManager().parse_args([MOONLIGHT_LORA]), 1, gpus_per_node=8)
    with built_rank(run, 0) as built:
        state = state_of(run, built)
    base, adapters = 15_960_108_544, 289_852_416
    assert state.parameters == 2 * base + 4 * adapters
    assert state.trained == state.gradients == 4 * adapters
    assert state.optimizer == pytest.approx(8 * adapters, rel=1e-4), "and the number of steps"


@pytest.mark.parametrize(
    "options",
    [
        ['--model.converters=["lora"]', "--lora.rank=8", "--training.dtype=bfloat16"],
        ['--training.frozen_fqns=["tok_embeddings.*", "layers.1.*"]'],
    ],
    ids=["adapters", "frozen"],
)
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_part_that_is_trained_costs_less_than_all(options: list[str], world_size: int) -> None:
    whole = plan(*DEBUG, world_size=world_size)
    part = plan(*DEBUG, *options, world_size=world_size)
    (closed,) = [closed_state(part.run, part.traces, place) for place in part.run.places()]
    for name in ("parameters", "trained", "gradients", "optimizer"):
        exact = getattr(part.memory[0].state, name)
        assert getattr(closed, name) == pytest.approx(exact, rel=0.02), name
    assert part.worst.peak.total < whole.worst.peak.total
    assert part.time.seconds < whole.time.seconds
    if world_size > 1:
        assert part.traffic[0]["fsdp"].inside < whole.traffic[0]["fsdp"].inside


def test_gathers_in_fp8_send_half_the_bytes_and_hold_half() -> None:
    options = [*DEBUG, '--model.converters=["float8"]', "--model.args.moe_inter_dim=128"]
    whole = plan(*options, world_size=2)
    key = "--quantize.linear.float8.enable_fsdp_float8_all_gather"
    half = plan(*options, key, world_size=2)
    pairs = zip(whole.traces.of_layer.values(), half.traces.of_layer.values(), strict=True)
    sent = []
    for before, after in pairs:
        saved = after.saved.gathered
        assert after.gathered == before.gathered - saved
        assert 0 <= saved < 0.5 * before.gathered
        sent.append(gather_bytes(half.run, after).inside / gather_bytes(whole.run, before).inside)
    assert 0.5 < min(sent) < 0.6 and max(sent) == 1.0, "experts' layers, and the ends"
    assert half.traffic[0]["fsdp"].inside < whole.traffic[0]["fsdp"].inside
    assert half.worst.peak.total < whole.worst.peak.total


def test_earlier_stages_hold_more_micro_batches(pipelined: Plan) -> None:
    assert pipelined.memory[0].most_in_flight == 4
    assert pipelined.memory[-1].most_in_flight == 1


def test_parts_of_a_step_add_up_and_stay_within_the_timeline(pipelined: Plan) -> None:
    time = pipelined.time
    assert sum(time.parts.values()) == pytest.approx(time.seconds)
    assert length(time.timeline) < time.seconds
    for passes in time.timeline:
        assert all(one.end <= other.start for one, other in pairwise(passes))


def test_bubble_of_1f1b_is_the_textbooks(pipelined: Plan) -> None:
    assert pipelined.run.pipeline is not None
    by_rank = actions_of(pipelined.run.pipeline)
    played = play(by_rank, lambda one: 1.0 if one.kind == "F" else 2.0, sending=0.0)
    assert idle(played) == pytest.approx(3 / (8 + 3))


def test_skew_fills_the_busiest_rank(pipelined: Plan) -> None:
    skewed = plan(*PIPELINE, world_size=64, hardware="h100", skew=3.0)
    routing = skewed.traces.routing
    assert routing is not None
    assert routing.skew == pytest.approx(3.0, rel=0.05)
    even = pipelined.traces.routing
    assert even is not None
    assert routing.slots > 1.1 * even.slots
    assert skewed.time.seconds > pipelined.time.seconds


def test_one_copy_per_node_crosses_least_and_the_limit_helps(pipelined: Plan) -> None:
    args = pipelined.run.model_args.moe_args
    rows = route(args, tokens=4096, ep=64, nodes=8).rows
    assert rows["node", "remote"] < rows["rank", "remote"] < rows["expert", "remote"]
    free = replace(args, num_expert_groups=None, num_limited_groups=None)
    assert rows["node", "remote"] < route(free, tokens=4096, ep=64, nodes=8).rows["node", "remote"]


def test_report_page_and_data_say_the_same(pipelined: Plan) -> None:
    text, data = table(pipelined, 1e12), as_data(pipelined, 1e12)
    assert json.loads(json.dumps(data))["step_seconds"] == pipelined.time.seconds
    assert f"{pipelined.speed.mfu:.1%} MFU" in text
    html = page(pipelined, [], 1e12)
    assert html.count("<svg") >= 4
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "<script" not in html
    assert '<meta name="viewport" content="width=device-width' in html
    assert not any(outside in html for outside in (" src=", " href=", "url(", "@import"))
    assert all(html.count(f"<{tag}") == html.count(f"</{tag}>") for tag in ("svg", "section", "ul"))


BATCHES = [(4, 128, 2), (8, 128, 2), (4, 512, 2), (8, 256, 1)]  # batch, length, a pass
PHASES = """
[model]
flavor = "debugmodel"
[training]
seq_len = 128
local_batch_size = 2
global_batch_size = 4
[[schedule.phase]]
name = "ramp"
tokens = 1e6
batch_size = 8
batch_size_shape = "linear"
batch_size_step = 4
[[schedule.phase]]
name = "long"
tokens = 3e6
batch_size = 4
seq_len = 512
[[schedule.phase]]
tokens = 2e6
lr = 1e-5
batch_size = 8
seq_len = 256
local_batch_size = 1
[[schedule.phase]]
tokens = 1e6
"""


def test_the_plan_of_a_schedule_shows_each_phase_and_details_the_fullest(tmp_path, capsys) -> None:
    """Each phase is as the plan of a run that has only its batch."""
    file, data = tmp_path / "phases.toml", tmp_path / "plan.json"
    file.write_text(PHASES)
    options = [str(file), "--world-size=1", f"--json={data}", f"--html={tmp_path / 'plan.html'}"]
    assert script("plan.py").main(options) == 0
    text, found = capsys.readouterr().out, json.loads(data.read_text())
    alone = [
        plan(
            "--model.flavor=debugmodel",
            f"--training.global_batch_size={batch}",
            f"--training.seq_len={length}",
            f"--training.local_batch_size={local}",
            hardware="h100",
        )
        for batch, length, local in BATCHES
    ]
    assert [row["phases"] for row in found["phases"]] == [[], [1], [2], [3, 4]]
    for row, one in zip(found["phases"], alone, strict=True):
        assert row["step_seconds"] == pytest.approx(one.time.seconds, rel=1e-6)
        needed = one.hardware.needed_gib(one.worst.peak.total)
        assert row["needed_gib"] == pytest.approx(needed, rel=1e-6)
    hours = [
        tokens / (batch * length) * one.time.seconds / 3600
        for tokens, (batch, length, _), one in zip([0, 1e6, 3e6, 3e6], BATCHES, alone, strict=True)
    ]
    assert found["gpu_hours"] == pytest.approx(sum(hours))
    fullest = max(alone, key=lambda one: one.worst.peak.total)
    assert fullest is alone[2] and found["seq_len"] == 512
    assert found["step_seconds"] == pytest.approx(fullest.time.seconds, rel=1e-6)
    assert "Most memory: phase 2 'long', which follows." in text
    assert "This is the last step of phase 2" in text
    assert "Phases, at their last step" in (tmp_path / "plan.html").read_text()


def test_a_phase_that_is_asked_for_is_planned_alone(tmp_path, capsys) -> None:
    file = tmp_path / "phases.toml"
    file.write_text(PHASES)
    assert script("plan.py").main([str(file), "--world-size=1", "--phase=3"]) == 0
    text = capsys.readouterr().out
    assert "This is the last step of phase 3" in text
    assert "Phases, at their last step" not in text


def test_what_does_not_fit_gets_a_key_that_makes_it_fit() -> None:
    options = [*presets.PRESETS["16b8-b8-bf16"], *presets.NO_FILES]
    tight = plan(*options, hardware="h100")
    assert tight.fits
    small = replace(tight.hardware, memory_gib=45.0)
    sentence = nearest_fit(replace(tight, hardware=small), 1.0)
    assert "activation_checkpoint.mode" in sentence, sentence
    assert "fits" in sentence


@pytest.mark.parametrize("dispatch", ["all_gather", "auto"])
def test_a_cuda_graph_is_planned_as_the_run_without_it(dispatch: str) -> None:
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    options += [f"--parallelism.expert_parallel_{key}" for key in ("degree=2", "node_size=2")]
    without = plan(*options, world_size=2)
    graph = f"--parallelism.expert_parallel_dispatch={dispatch}", "--compile.cuda_graph"
    assert plan(*options, *graph, world_size=2).time == without.time


@pytest.mark.parametrize(
    "options",
    [
        ["--parallelism.expert_parallel_dispatch=all_to_all"],
        ["--parallelism.expert_parallel_node_size=1"],
        ["--model.args.moe_args.score_before_experts=true"],
    ],
    ids=["all_to_all", "between nodes", "no operator for all products"],
)
def test_a_cuda_graph_that_the_run_would_refuse_is_refused(options: list[str]) -> None:
    preset = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    graph = "--parallelism.expert_parallel_degree=2", "--compile.cuda_graph"
    with pytest.raises(UserError, match="needs message sizes that don't change"):
        plan(*preset, *graph, *options, world_size=2)


PRODUCTS = ("matrix products", "matrix products in FP8")


def flops_by_kind(found: Plan) -> Counter[str]:
    total: Counter[str] = Counter()
    for layer in found.traces.of_layer.values():
        for work in (layer.forward, layer.backward):
            for kind, flops in work.flops.items():
                total[kind.removeprefix("fp8 ")] += flops
    return total


@pytest.mark.parametrize("recipe", ["", "rowwise", "head"])
def test_products_in_fp8_have_the_flops_of_bf16_and_take_less_time(recipe: str) -> None:
    options = [*presets.PRESETS["16b8-b4-fp32"], *presets.NO_FILES]
    fp8 = ["--model.converters=float8"]
    fp8 += ["--quantize.linear.float8.recipe_name=rowwise"] * (recipe == "rowwise")
    fp8 += ["--quantize.linear.float8.head"] * (recipe == "head")
    plain, converted = plan(*options), plan(*options, *fp8)
    assert flops_by_kind(converted) == flops_by_kind(plain)
    if recipe != "rowwise":  # whose quantising is counted as if nothing fused it
        assert converted.time.seconds < plain.time.seconds
    unknown = replace(converted.hardware, fp8_gemm=0.0, fp8_grouped=0.0)
    states = {0: closed_state(converted.run, converted.traces, 0)}
    as_bf16 = step_time(converted.run, converted.traces, states, unknown, []).parts
    assert as_bf16["experts"] == pytest.approx(plain.time.parts["experts"])
    products = sum(as_bf16.get(name, 0.0) for name in PRODUCTS)
    assert products == pytest.approx(plain.time.parts[PRODUCTS[0]])


CONFIG = str(SCRIPTS.parent / "train_configs/debug_model.toml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hardware", "h300"], "--hardware 'h300' is not in hardware.toml"),
        (["--world-size", "1000000"], "--world-size 1000000 must be from 1 to 131,072"),
        (["--world-size", "0"], "--world-size 0"),
        (["--parallelism.tensor_parallel_degree", "3"], "tensor_parallel_degree = 3"),
        (["--parallelism.expert_parallel_degree", "5"], "expert_parallel_degree = 5"),
        (["--parallelism.nothing", "3"], "nothing"),
        (["--routing-skew", "0.5"], "--routing-skew 0.5 must be from 1"),
        (["--routing-skew-from", "/nowhere.jsonl"], "--routing-skew-from /nowhere.jsonl"),
        (["--routing-skew-from", CONFIG], "can't be read"),
        (["--tokens", "-1"], "--tokens -1 must be above 0"),
        (["--html", "/nowhere/plan.html"], "make its folder first"),
        (["--phase", "3"], "--phase 3"),
    ],
)
def test_bad_input_gets_a_sentence(capsys, options: list[str], words: str) -> None:
    world = [] if "--world-size" in options else ["--world-size", "4"]
    assert script("plan.py").main([CONFIG, *world, *options]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted"),
        (MemoryError(), 2, "this machine's memory is used up by the plan itself: plan fewer ranks"),
    ],
)
@pytest.mark.parametrize("where", ["make_plan", "sweep"])
def test_an_early_end_is_a_sentence(capsys, monkeypatch, where, error, code, words) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    module = script("plan.py")
    monkeypatch.setattr(module, where, end)
    assert module.main([CONFIG, "--world-size", "1", "--sweep"]) == code
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_a_damaged_table_of_hardware_is_told(tmp_path, monkeypatch) -> None:
    damaged = tmp_path / "hardware.toml"
    damaged.write_text(TABLE.read_text().replace("gemm = 0.70", "gemm = 'fast'"))
    monkeypatch.setattr("torchtitan.planning.hardware.TABLE", damaged)
    with pytest.raises(ValueError, match="gemm = 'fast' must be a number"):
        find_hardware("h200")
