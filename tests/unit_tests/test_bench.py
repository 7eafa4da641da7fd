"""scripts/bench.py on a CPU: rows and their JSON, a breakdown that sums up, peers, mistakes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.tiny_run import TINY
from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.config import ConfigManager
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.trainer.preflight import check_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
OPTIONS = [
    f"--{key}={value}" for key, value in TINY.items() if key not in ("training.steps", "debug.seed")
]


@pytest.fixture(scope="module", autouse=True)
def script():
    """Import the script as `python scripts/bench.py` does."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def bench(*arguments: str) -> int:
    import bench

    return bench.main(list(arguments))


@pytest.fixture(scope="module")
def rows(script, tmp_path_factory):
    """One run that several tests look at, with a peer that isn't there."""
    out = tmp_path_factory.mktemp("bench") / "rows.json"
    peers = ["--peers", "torchtitan"]
    options = ["--warmup=1", "--steps=2", f"--out={out}", *peers, *OPTIONS]
    assert bench("step", *options) == 0
    return json.loads(out.read_text())


def test_a_row_says_how_fast_and_under_which_settings(rows):
    row = rows[0]
    assert row["name"] == "ours" and row["step_seconds"]["count"] == 2
    tokens = 4 * 32
    assert row["tokens_per_second"]["median"] == pytest.approx(
        tokens / row["step_seconds"]["median"], rel=0.5
    )
    flops = row["settings"]["flops_per_token"] * row["tokens_per_second"]["median"]
    assert row["tflops"] == pytest.approx(flops / 1e12)
    assert row["mfu_percent"] is None, "a CPU's peak is not known"
    assert row["peak_gib"] > 0
    assert row["machine"]["torch"] == torch.__version__ and row["machine"]["date"]
    assert row["settings"]["model_args"]["dim"] == 64
    assert row["first_loss"] == pytest.approx(7.62, abs=0.2), "ln(2048): the tokens are random"


def test_the_parts_sum_to_the_step_and_the_model_is_found_in_them(rows):
    from benchmarks.breakdown import PARTS

    breakdown = rows[0]["breakdown"]
    assert tuple(breakdown["ms"]) == PARTS
    step_ms = rows[0]["step_seconds"]["median"] * 1e3
    assert sum(breakdown["ms"].values()) == pytest.approx(step_ms)
    silent = {part for part, ms in breakdown["ms"].items() if ms == 0}
    assert silent <= {"communication", "waiting"}, "one process has nobody to talk to"


def test_a_peer_that_is_not_there_is_named_with_the_way_to_get_it(rows):
    assert rows[1]["name"] == "torchtitan"
    assert "pip install" in rows[1]["missing"] and "0.2.2" in rows[1]["missing"]


def test_a_toml_whose_data_and_tokenizer_are_elsewhere_is_measured(script, capsys):
    toml = SCRIPTS.parent / "train_configs/deepseek_v3_16b.toml"
    small = [o for o in OPTIONS if "dataset" not in o] + ["--training.global_batch_size=-1"]
    small += ["--model.args.vocab_size=2048", "--compile.no_enable"]
    small += ["--parallelism.expert_parallel_degree=1"]  # one process
    command = ["step", "--warmup=1", "--steps=1", "--no_breakdown"]
    assert bench(*command, f"--job.config_file={toml}", *small) == 0
    assert "ours" in capsys.readouterr().out


def test_operators_find_their_parts(script):
    """One forward and backward pass of known operators: each under the part of its module."""
    from benchmarks.breakdown import StepProfile

    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"0": nn.Module()})
            self.layers["0"].attention = nn.Linear(48, 40, bias=False)
            self.output = nn.Linear(40, 56, bias=False)

        def forward(self, x):
            return self.output(self.layers["0"].attention(x))

    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    compiled = SimpleNamespace(enable=False, components=[])
    x = torch.randn(2048, 48)
    trainer = SimpleNamespace(
        model=model,
        config=SimpleNamespace(compile=compiled),
        passes=SimpleNamespace(loss_fn=torch.sum),
        forward_backward=lambda: trainer.passes.loss_fn(model(x)).backward(),
    )

    def step():
        optimizer.zero_grad()
        trainer.forward_backward()
        optimizer.step()

    profile = StepProfile(trainer, tokens=2048)
    step()
    found = {part: ms for part, ms in profile.measure(step, 1.0)["ms"].items() if ms > 0}
    assert {"attention GEMMs", "head + loss", "optimizer"} <= set(found)
    assert {"expert GEMMs", "core attention", "router", "shared experts"}.isdisjoint(found)
    assert sum(found.values()) == pytest.approx(1000)
    # Without the modules' ranges, as in compiled layers, sizes alone tell GEMMs apart.
    assert profile.part_of_sizes == {
        frozenset((48, 40)): "attention GEMMs",
        frozenset((40, 56)): "head + loss",
    }


def test_products_are_known_by_their_factors_not_by_their_output():
    """Compiled layers multiply into a given output, whose shape the profiler lists with the
    factors': square weights were taken for others, or for none."""
    from benchmarks.breakdown import gemm_sizes
    from torch.profiler import ProfilerActivity, profile

    x, w, bias = torch.randn(40, 6), torch.randn(6, 8), torch.randn(8)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.mm(x, w, out=torch.empty(40, 8))
        torch.addmm(torch.randn(40, 8), x, w, out=torch.empty(40, 8))
        torch.addmm(bias, x, w)
    names = ("aten::mm", "aten::addmm")
    events = [e for e in profiler.events() if e.name in names and e.input_shapes]
    assert len(events) == 3
    assert all(gemm_sizes(e.input_shapes) == [40, 6, 8] for e in events)
    assert gemm_sizes([[40, 6], [1, 8, 6], [1], [], []]) == [40, 6, 8]  # in FP8
    assert gemm_sizes([[40, 6], [8, 6]]) == [40, 6, 8]  # aten::linear
    assert gemm_sizes([[40, 6], []]) == gemm_sizes([[40, 6], [7, 8]]) == []


def test_weights_of_equal_sizes_in_two_parts_are_not_guessed(script):
    from benchmarks.breakdown import weight_sizes

    model = nn.Module()
    model.output = nn.Linear(8, 4, bias=False)
    model.layers = nn.ModuleDict({"0": nn.Module()})
    model.layers["0"].attention = nn.ModuleDict({"wo": nn.Linear(4, 8, bias=False)})
    assert weight_sizes(model) == {}


def test_copies_of_the_weights_do_not_change_their_sizes(script):
    """A module's attribute is then the copy, which is no parameter."""
    from benchmarks.breakdown import weight_sizes

    sizes = {"n_layers": 2, "dim": 32, "vocab_size": 64}
    args = deepseekv3_args["debugmodel"].for_run(overrides=sizes, seq_len=16)
    model = DeepSeekV3Model(args)
    model.init_weights()
    expected = weight_sizes(model)
    ComputeWeights(model.modules(), torch.bfloat16, root=model, grad_dtype=torch.bfloat16)
    assert weight_sizes(model) == expected and "attention GEMMs" in expected.values()


def test_kernels_of_a_graph_are_known_by_their_names(script):
    """A replayed graph launches them all: no operator, no sizes, no module."""
    from benchmarks.breakdown import _add_unlinked

    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "other GEMMs",
        "grouped_mm": "expert GEMMs",
        "_reduce_rows_kernel": "dispatch/combine",
        "gatherTopK": "router",
        "triton_poi_fused_mul_silu_3": "elementwise",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "core attention",
    }
    spans = SimpleNamespace(elapsed_us=lambda: 2000.0)
    events = [SimpleNamespace(name=name, time_range=spans) for name in names]
    busy = dict.fromkeys(names.values(), 0.0)
    _add_unlinked(busy, {"nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": 0.5}, events)
    assert busy == {part: 1.5 if part == "other GEMMs" else 2.0 for part in names.values()}


def test_idle_fills_up_a_gpu_step_and_a_cpu_step_is_scaled(script):
    from benchmarks.breakdown import fill_up

    busy = {"router": 3.0, "optimizer": 5.0}
    gpu = fill_up(busy, wall_ms=40, step_ms=10, on_gpu=True)
    assert (gpu["router"], gpu["optimizer"], gpu["idle"]) == (3.0, 5.0, 2.0)
    cpu = fill_up(busy, wall_ms=40, step_ms=10, on_gpu=False)
    assert (cpu["router"], cpu["optimizer"], cpu["idle"]) == (0.75, 1.25, 8.0)
    full = fill_up(busy, wall_ms=40, step_ms=4, on_gpu=True)
    assert full["idle"] == 0 and sum(full.values()) == pytest.approx(4)


def test_kernels_are_timed_beside_their_plain_ways(script, tmp_path, capsys):
    out = tmp_path / "kernels.json"
    sizes = ["--tokens=64", "--seq_len=32", "--vocab=256", "--params=1e-4", "--reps=2"]
    assert bench("kernels", "--widths", "debugmodel", *sizes, f"--out={out}") == 0
    rows = {row["kernel"]: row for row in json.loads(out.read_text())}
    assert {"moe", "moe, plain chain", "core", "head", "head, three GEMMs alone"} <= set(rows)
    assert {"router", "norm", "rope", "optimizer"} <= set(rows)
    for name in ("moe", "core", "norm"):
        assert rows[name]["forward_ms"]["count"] == rows[name]["backward_ms"]["count"] == 2
    flops = 6 * 64 * 3 * 256 * 256
    seconds = rows["moe"]["forward_ms"]["median"] / 1e3
    assert rows["moe"]["forward_tflops"] == pytest.approx(flops / seconds / 1e12)
    assert len(capsys.readouterr().out) < 12_000


def test_the_plain_chain_is_the_layer(script):
    from benchmarks.kernels import plain_chain

    from torchtitan.models.moe import MoE, MoEArgs

    torch.manual_seed(0)
    args = MoEArgs(num_experts=4, num_shared_experts=0, top_k=2, score_before_experts=False)
    moe = MoE(args, dim=16, hidden_dim=32)
    with torch.no_grad():
        moe.init_weights(0.2)
    x_BSD = torch.randn(2, 24, 16)
    torch.testing.assert_close(plain_chain(moe, x_BSD), moe(x_BSD))


def test_presets_are_runs_that_the_config_takes(script):
    from benchmarks.presets import NO_FILES, PRESETS

    for name, options in PRESETS.items():
        if name != "16b-full":  # early_step_in_backward, see the hot path
            check_config(ConfigManager().parse_args([*options, *NO_FILES]))
    assert {"16b8-b4-fp32", "16b8-b8-bf16-docs", "671b3-b2-bf16", "16b-full"} <= set(PRESETS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["step", "--preset", "16b8-b4-fp23"], "did you mean '16b8-b4-fp32'"),
        (["step", "--peers", "torchtitn", *OPTIONS], "did you mean 'torchtitan'"),
        (["step", "--torchtitan_site", ".", *OPTIONS], "holds no torchtitan"),
        (["step", "--training.seq_lenn=8"], "did you mean"),
        (["step", "--out", "nowhere/rows.json", *OPTIONS], "make its folder first"),
        (["kernels", "--widths", "17B"], "did you mean '16B'"),
        (["kernels", "--tokens=100", "--seq_len=64"], "must be a multiple of --seq_len"),
    ],
)
def test_a_mistake_is_one_sentence(script, capsys, arguments, words):
    assert bench(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
