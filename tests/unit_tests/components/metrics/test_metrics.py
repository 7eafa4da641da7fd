"""What comes out of the writers, read back and compared with what went in."""

import io
import json
import logging
import math
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from torchtitan.components.metrics.expert_load import load_balance, relative_load
from torchtitan.components.metrics.logger import MetricsLogger
from torchtitan.components.metrics.names import CURVES

LOSS = CURVES["loss"]
# Layer 1: expert 2 has 9 of 12 tokens, mean 3. Layer 4: balanced but for one token each way.
LOADS = {1: torch.tensor([1, 2, 9, 0]), 4: torch.tensor([3, 4, 2, 3])}
STEP = dict(
    loss=3.1415926535897931,
    max_loss=3.5,
    grad_norm=0.25,
    lr=4e-4,
    tokens=4000,
    tokens_seen=123_456_789_012,
    flops=8e12,
    step_seconds=[0.5, 1.5],
    data_seconds=0.1,
    expert_loads=LOADS,
)


def logger_for(folder, **changes):
    settings = dict(
        dump_folder=folder,
        log_freq=10,
        total_steps=95,
        enable_tensorboard=False,
        save_tb_folder="tb",
        save_for_all_ranks=False,
        disable_color_printing=True,
        device=torch.device("cpu"),
        peak_flops=None,
    )
    return MetricsLogger(**{**settings, **changes})


def log_once(folder, *, step=1, changes=None, **settings):
    with closing(logger_for(folder, **settings)) as metrics:
        metrics.log(step=step, **{**STEP, **(changes or {})})


def records(folder, name="metrics.jsonl"):
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture
def console(caplog):
    caplog.set_level(logging.INFO, logger="torchtitan")
    return lambda: caplog.messages[-1]


def test_first_every_tenth_and_last_step_are_logged(tmp_path):
    metrics = logger_for(tmp_path)
    logged = [step for step in range(1, 96) if metrics.should_log(step)]
    assert logged == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95]
    metrics.close()


# ---------------------------------------------------------------- JSON lines


def test_record_holds_the_numbers_put_in_and_those_derived_by_hand(tmp_path):
    log_once(tmp_path, world_size=4, peak_flops=1e13, changes=dict(extra={"skipped_steps": 3}))
    (record,) = records(tmp_path)
    for name in ("loss", "max_loss", "grad_norm", "lr", "tokens_seen"):
        assert record[name] == STEP[name]  # Exactly: full precision.
    assert record["step"] == 1 and record["skipped_steps"] == 3
    assert abs(record["time"] - time.time()) < 60
    # 4000 tokens in 2 s on 4 devices = 500 a second each, 8 TFLOP in all = 1 TFLOP/s of 10.
    assert record["tps"] == 500 and record["tflops"] == 1.0 and record["mfu_percent"] == 10.0
    assert record["step_seconds"] == 1.0 and record["max_step_seconds"] == 1.5
    assert record["data_seconds"] == pytest.approx(0.05)
    assert record["data_percent"] == pytest.approx(5.0)
    # MaxVio: (9 - 3) / 3 = 2 and (4 - 3) / 3.
    assert record["layer_max_violation"] == {"1": 2.0, "4": pytest.approx(1 / 3)}
    assert record["max_violation"] == 2.0
    assert record["mean_max_violation"] == pytest.approx(7 / 6)
    assert record["layer_min_load"] == {"1": 0.0, "4": pytest.approx(2 / 3)}
    assert record["min_load"] == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_on_cpu_is_the_resident_peak(tmp_path):
    ballast = torch.ones(50 * 2**20 // 4)  # 50 MiB, touched.
    log_once(tmp_path)
    (record,) = records(tmp_path)
    assert ballast.sum() > 0
    # The kernel's own tables, both in KiB: the process's high-water mark, the machine's memory.
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    total = int(re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    assert record["memory_gib"] == pytest.approx(peak / 2**20, rel=0.05)
    assert record["memory_percent"] == pytest.approx(100 * peak / total, rel=0.05)


def test_without_a_known_peak_there_is_no_mfu(tmp_path, console):
    log_once(tmp_path)
    assert "mfu_percent" not in records(tmp_path)[0]
    assert "mfu" not in console()


def test_dense_model_has_no_expert_numbers(tmp_path):
    log_once(tmp_path, changes=dict(expert_loads={}), enable_tensorboard=True)
    assert not any("violation" in name or "load" in name for name in records(tmp_path)[0])
    assert event_files(only_run(tmp_path)).Tags()["images"] == []


def test_not_a_number_and_infinity_are_strings_in_valid_json(tmp_path):
    bad = dict(loss=math.nan, grad_norm=math.inf, max_loss=-math.inf)
    log_once(tmp_path, changes=bad, enable_tensorboard=True)
    (record,) = records(tmp_path)
    assert (record["loss"], record["grad_norm"], record["max_loss"]) == (
        "NaN",
        "Infinity",
        "-Infinity",
    )
    assert math.isnan(float(record["loss"])) and float(record["max_loss"]) == -math.inf


def test_resumed_run_appends(tmp_path):
    log_once(tmp_path, step=10)
    log_once(tmp_path, step=20, start_step=10)
    assert [record["step"] for record in records(tmp_path)] == [10, 20]


def test_a_new_run_keeps_the_records_of_the_earlier_ones_beside_its_own(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="torchtitan")
    for loss in (5.0, 4.0, 3.0):
        log_once(tmp_path, changes=dict(loss=loss), rank=1, save_for_all_ranks=True)
        log_once(tmp_path, changes=dict(loss=loss))
    log_once(tmp_path, step=2, start_step=1, changes=dict(loss=2.0))
    expected = {"metrics.1.jsonl": [5.0], "metrics.2.jsonl": [4.0], "metrics.jsonl": [3.0, 2.0]}
    found = {name: [record["loss"] for record in records(tmp_path, name)] for name in expected}
    assert found == expected
    others = {"metrics.rank_1.jsonl", "metrics.rank_1.1.jsonl", "metrics.rank_1.2.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == set(expected) | others
    assert any(
        line.endswith("metrics.jsonl of an earlier run is now metrics.2.jsonl")
        for line in caplog.messages
    )


def test_a_run_that_ended_before_its_first_record_leaves_nothing_aside(tmp_path):
    logger_for(tmp_path).close()
    log_once(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_line_torn_by_a_kill_is_dropped_on_resume_and_whole_lines_stay(tmp_path):
    log_once(tmp_path, step=10)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 20, "loss": 3.1')
    log_once(tmp_path, step=20, start_step=10)
    assert path.read_bytes().startswith(whole)
    assert [record["step"] for record in records(tmp_path)] == [10, 20]


def test_each_record_is_on_disk_before_the_next_step(tmp_path):
    metrics = logger_for(tmp_path)
    metrics.log(step=1, **STEP)
    assert len(records(tmp_path)) == 1  # Not closed: a killed run keeps it.
    metrics.close()


def test_a_further_number_may_not_hide_one_of_ours(tmp_path):
    with pytest.raises(AssertionError, match="'loss' is taken"):
        log_once(tmp_path, changes=dict(extra={"loss": 0.0}))


# ---------------------------------------------------------------- ranks


def test_other_ranks_write_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="torchtitan")
    log_once(tmp_path, rank=1, world_size=2, enable_tensorboard=True)
    assert list(tmp_path.iterdir()) == [] and not caplog.messages


def test_other_ranks_write_their_own_files_when_asked(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="torchtitan")
    log_once(tmp_path, rank=1, world_size=2, enable_tensorboard=True, save_for_all_ranks=True)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.rank_1.jsonl", "tb"}
    assert records(tmp_path, "metrics.rank_1.jsonl")[0]["loss"] == STEP["loss"]
    (run,) = (tmp_path / "tb" / "rank_1").iterdir()
    assert event_files(run).Scalars(LOSS)
    assert not caplog.messages, "the console is rank 0's"


# ---------------------------------------------------------------- TensorBoard


def only_run(folder):
    (run,) = (folder / "tb").iterdir()
    return run


def event_files(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_has_every_number_of_the_json_record(tmp_path):
    extra = {"blend_tokens": {"web": 70, "code": 30}}
    log_once(tmp_path, step=10, enable_tensorboard=True, peak_flops=1e13, changes={"extra": extra})
    (record,) = records(tmp_path)
    expected = {}
    for name, value in record.items():
        if name == "blend_tokens":
            expected |= {"data_metrics/blend_tokens/web": 70, "data_metrics/blend_tokens/code": 30}
        elif isinstance(value, dict):
            short = f"balance_by_layer/{name.removeprefix('layer_')}"
            expected |= {f"{short}/layer_{layer}": number for layer, number in value.items()}
        elif name not in ("step", "time"):
            expected[CURVES[name]] = value
    events = event_files(only_run(tmp_path))
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, value in expected.items():
        (point,) = events.Scalars(name)
        assert point.step == 10 and point.value == pytest.approx(value, rel=1e-6), name


def test_steps_repeated_after_a_resume_replace_the_old_curve(tmp_path):
    first = logger_for(tmp_path, enable_tensorboard=True)
    for step, loss in ((10, 5.0), (20, 4.0), (30, 3.0)):
        first.log(step=step, **{**STEP, "loss": loss})
    first.close()
    time.sleep(1.1)  # Event files are ordered by the second in their name.
    changes = dict(enable_tensorboard=True, start_step=10)
    log_once(tmp_path, step=20, changes=dict(loss=4.5), **changes)
    points = [(p.step, p.value) for p in event_files(only_run(tmp_path)).Scalars(LOSS)]
    assert points == [(10, 5.0), (20, 4.5)]


def test_each_new_run_has_its_own_curves_and_a_resume_goes_on_with_the_newest(
    tmp_path, monkeypatch, console
):
    def run(clock, loss, **settings):
        monkeypatch.setattr("time.strftime", lambda pattern: clock)
        # Names of event files end in a count of this process's, and within a second are read in
        # the order of text: "10" before "9", of which no run has both.
        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
        logger_for(tmp_path, enable_tensorboard=True, **settings).close()
        folder = re.search(r"curves in (\S+);", console())[1]
        log_once(tmp_path, enable_tensorboard=True, start_step=1, step=2, changes=dict(loss=loss))
        return Path(folder)

    clocks = ["20260102-0959", "20260102-1000", "20260102-1000", "20260102-1000", "20260102-0930"]
    folders = [run(clock, loss=float(n)) for n, clock in enumerate(clocks)]
    names = [folder.relative_to(tmp_path / "tb").name for folder in folders]
    assert names[:2] == clocks[:2] and names == sorted(set(names)), "unique, in order of time"
    assert sorted((tmp_path / "tb").iterdir()) == folders
    for n, folder in enumerate(folders):
        assert [point.value for point in event_files(folder).Scalars(LOSS)] == [n]


def test_a_run_is_dated_as_in_torchtitan(tmp_path):
    before = time.strftime("%Y%m%d-%H%M")
    log_once(tmp_path, enable_tensorboard=True)
    assert before <= only_run(tmp_path).name <= time.strftime("%Y%m%d-%H%M")


def test_without_tensorboard_it_is_not_even_imported(tmp_path):
    """On each of thousands of ranks it would cost a second and some memory."""
    code = (
        "import sys, torch; from torchtitan.components.metrics.logger import MetricsLogger\n"
        f"MetricsLogger(dump_folder={str(tmp_path)!r}, log_freq=1, total_steps=1, "
        "enable_tensorboard=False, save_tb_folder='tb', save_for_all_ranks=False, "
        "disable_color_printing=True, device=torch.device('cpu'), "
        "peak_flops=None)\n"
        "assert not any(name.startswith('tensorboard') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------- load balance


def test_violation_of_perfect_and_of_collapsed_routing():
    relative = relative_load(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0]]))
    balance = load_balance([3, 4, 5], relative)
    # All 20 tokens at one of 4 experts: (20 - 5) / 5. No tokens at all: nothing is violated.
    assert balance["layer_max_violation"] == {3: 0.0, 4: 3.0, 5: 0.0}
    assert balance["layer_min_load"] == {3: 1.0, 4: 0.0, 5: 1.0}
    assert balance["max_violation"] == 3.0 and balance["mean_max_violation"] == 1.0


# ---------------------------------------------------------------- console


def test_console_line_says_all_in_one_line(tmp_path, console):
    log_once(tmp_path, step=10, peak_flops=1e13)
    line = console()
    for part in (
        "step: 10/95",
        "loss:  3.14159",
        "grad_norm:  0.2500",
        "lr: 4.00e-04",
        "tps: 2,000",
        "tflops: 4.00",
        "mfu: 40.00%",
        "data: 5.0%",
    ):
        assert part in line, part
    gib, percent = (records(tmp_path)[0][name] for name in ("memory_gib", "memory_percent"))
    assert f"{gib:.2f}GiB({percent:.1f}%)" in line
    assert "\n" not in line and "\033" not in line


def test_console_shows_a_loss_that_is_not_a_number(tmp_path, console):
    log_once(tmp_path, changes=dict(loss=math.nan))
    assert "nan" in console()


@pytest.mark.parametrize(
    "terminal, no_color, disabled, coloured",
    [
        (True, "", False, True),
        (False, "", False, False),
        (True, "1", False, False),
        (True, "", True, False),
    ],
)
def test_colours_only_on_a_terminal_that_wants_them(
    tmp_path, console, monkeypatch, terminal, no_color, disabled, coloured
):
    monkeypatch.setattr("sys.stderr", Terminal(terminal))
    monkeypatch.setenv("NO_COLOR", no_color)
    log_once(tmp_path, disable_color_printing=disabled)
    assert ("\033[" in console()) == coloured


class Terminal(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def test_introduction_says_whether_the_peak_is_known(tmp_path, console):
    logger_for(tmp_path, peak_flops=989e12, world_size=8).close()
    assert "peak 989 TFLOP/s" in console() and "8 x " in console()
    logger_for(tmp_path).close()
    assert "peak unknown, so no MFU" in console()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_gpu_is_the_peak_since_the_last_log(tmp_path):
    metrics = logger_for(tmp_path, device=torch.device("cuda"))
    torch.zeros(2**28, dtype=torch.uint8, device="cuda")  # 0.25 GiB, freed at once.
    metrics.log(step=1, **STEP)
    torch.cuda.empty_cache()
    metrics.log(step=10, **STEP)
    metrics.log(step=20, **STEP)
    metrics.close()
    active = [record["memory_active_gib"] for record in records(tmp_path)]
    assert active[0] >= 0.25 > active[2]
