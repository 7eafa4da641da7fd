"""The report of recorded runs: what is on the page, and what is said where records are missing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.scripts import script
from tests.tiny_run import tiny
from torchtitan.report import read, report_at_end
from torchtitan.report.charts import thinned
from torchtitan.report.read import Curve, read_run
from torchtitan.tools.errors import UserError
from torchtitan.train import main

pytest.importorskip("plotly", reason="plotly, which draws the report, is not installed")
report = script("report.py").main


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def event(step: int, kind: str, **facts) -> dict:
    return {"step": step, "time": 1.8e9 + step, "event": kind, **facts}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records of a run with everything that a page shows, written by hand."""
    folder = tmp_path / "run"
    folder.mkdir()
    steps = [
        {
            "step": step,
            "time": 1.8e9 + step,
            "loss": 8.0 / step,
            "max_loss": "NaN" if step == 4 else 9.0 / step,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tps": 1000.0,
            "mfu_percent": 41.5,
            "step_seconds": 2.0,
            "max_step_seconds": 2.5,
            "data_seconds": 0.5,
            "max_violation": 0.5,
            "layer_max_violation": {"1": 0.5},
            "bytes_sent_remote": 2**30,
            "blend_tokens": {"web": 100, "code": 50},
        }
        for step in range(1, 9)
    ]
    steps[5] |= {"waited_ms": 900.0, "waited_for_rank": 3.0, "waited_for_host_ms": 800.0}
    steps[7] |= {"validation_loss": 1.25, "validation_set_loss": {"chat": 1.0, "web": 1.5}}
    write_lines(folder / "metrics.jsonl", steps)
    events = [
        event(0, "start", steps=8, devices=4, device="H100", layout="FSDP"),
        event(2, "skip", loss="nan"),
        event(3, "phase", title="2 'long'", settings="learning rate 0.001"),
        event(4, "checkpoint", path="checkpoint/step-4", seconds=1.5),
        event(4, "start", steps=8, devices=4, device="H100", layout="FSDP"),
        event(6, "rewind", loss=99.0),
        event(7, "alarm", why="step 7: alarm: loss = 9 is above 5"),
        event(8, "sample", prompt="<b>One</b>", text=" day & night"),
        event(8, "end", how="was ended by SIGTERM short of 8 steps"),
    ]
    write_lines(folder / "events.jsonl", events)
    loads = [{"step": s, "percent_of_mean": {"1": [50, 150], "2": [100, 100]}} for s in (1, 8)]
    write_lines(folder / "expert_load.jsonl", loads)
    settings = {"training": {"steps": 8, "seq_len": 2048}, "model": {"name": "m", "flavor": "f"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model_args.json").write_text(json.dumps({"dim": 64}))
    return folder


def text_of(page: Path) -> str:
    """The page without plotly's own code and without tags."""
    body = page.read_text().partition("</head>")[2]
    body = re.sub(r"<script.*?</script>", "", body, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_the_page_has_everything_that_was_recorded(folder):
    assert report([str(folder)]) == 0
    page = text_of(folder / "report.html")
    for part in (
        "was ended by SIGTERM short of 8 steps",
        "8 of 8",
        "4 x H100",
        "41.5 % MFU",
        "validation loss 1.2500",
        "skipped loss nan",
        "rewind to the last checkpoint loss 99.0",
        "alarm loss = 9 is above 5",
        "restart goes on after step 4, on 4 x H100",
        "rank 3 is late the others waited 900 ms for its host",
        "1 saved, the last after step 4",
        "checkpoint/step-4",
        "2 &#x27;long&#x27;",
        "&lt;b&gt;One&lt;/b&gt; day &amp; night",
        "training.steps 8 10000",
        "Load of each expert",
        "Traffic of dispatch and combine",
        "Tokens read from each dataset",
        "Validation loss of each data set",
        "Learning rate",
    ):
        assert part in page, part
    assert "training.seq_len" not in page.partition("All settings")[0], "as the default"


def test_the_page_needs_no_network(folder):
    report([str(folder)])
    page = (folder / "report.html").read_text()
    head = page.partition("<script>")[0] + page.rpartition("</script></head>")[2]
    assert not re.search(r"(src|href)\s*=\s*[\"']?\w+:", head) and "@import" not in head
    assert 'name="viewport"' in head and "prefers-color-scheme: dark" in head


def test_runs_beside_each_other_have_their_curves_and_what_differs(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes().replace(b"2048", b"4096"))
    page = tmp_path / "both.html"
    assert report([str(folder), str(other), "--out", str(page)]) == 0
    assert "training.seq_len 2048 4096" in text_of(page)
    assert "training.steps" not in text_of(page), "the same in both"
    assert '"name":"run: training"' in page.read_text()
    assert '"name":"other: training"' in page.read_text()


def test_broken_lines_are_left_out_and_counted(folder, caplog):
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 0, "lo\nno json\n[1]\n' + path.read_text() + '{"step": 9')
    assert report([str(folder)]) == 0
    assert len(read_run(folder).curves["loss"].steps) == 8
    assert "4 broken lines of metrics.jsonl left out" in text_of(folder / "report.html")


def test_numbers_that_are_not_finite_are_read(folder):
    values = read_run(folder).curves["max_loss"].values
    assert np.isnan(values[3]) and np.isfinite(np.delete(values, 3)).all()


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda run: run.rename(run.with_name("gone")), "run doesn't exist; give the job.dump_"),
        (lambda run: (run / "metrics.jsonl").unlink(), "run holds no metrics.jsonl, so it is no"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "has no record of a step yet; wait"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), "of a step (1 broken lines); wait"),
        (lambda run: (run / "config.json").write_text("{"), "config.json is not the JSON that a"),
        (lambda run: (run / "report.html").mkdir(), "report.html can't be written (Is a directory"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_sentence(folder, capsys, damage, sentence):
    damage(folder)
    assert report([str(folder)]) == 2
    errors = capsys.readouterr().err
    assert sentence in errors and len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize("file", ["events.jsonl", "expert_load.jsonl", "config.json"])
def test_a_run_without_one_of_the_other_files_has_a_page(folder, file):
    (folder / file).unlink()
    assert report([str(folder)]) == 0


def test_an_earlier_run_has_its_curves(folder):
    (folder / "metrics.jsonl").rename(folder / "metrics.1.jsonl")
    assert report([str(folder / "metrics.1.jsonl"), "--out", str(folder / "report.html")]) == 0
    assert "Throughput" in text_of(folder / "report.html")


def test_of_many_loads_records_at_regular_distances_are_read(folder, monkeypatch):
    monkeypatch.setattr(read, "_MOST_LOADS", 25)
    loads = {"1": [50, 150], "2": [100, 100]}
    lines = [{"step": step, "percent_of_mean": loads} for step in range(1, 11)]
    write_lines(folder / "expert_load.jsonl", lines)
    run = read_run(folder)
    assert list(run.load_steps) == [1, 3, 5, 7, 9]
    assert run.loads[2].tolist() == [[100, 100]] * 5


def test_a_thinned_curve_keeps_means_peaks_and_the_end():
    values = np.arange(10_000.0)
    values[5] = np.nan
    curve = Curve(np.arange(1, 10_001), values)
    mean, peak = thinned(curve, 1000), thinned(curve, 1000, largest=True)
    assert len(mean.steps) == 1000 and mean.steps[-1] == 10_000
    assert mean.values[0] == pytest.approx((sum(range(10)) - 5) / 9) and peak.values[0] == 9.0


# ------------------------------------------------------------------ the end of a run


def test_a_run_leaves_its_page(tmp_path):
    assert main(tiny(tmp_path, metrics__enable_report="true", training__steps=2)) == 0
    page = text_of(tmp_path / "report.html")
    assert "finished" in page and "2 of 2" in page and "Load of each expert" in page
    assert read_run(tmp_path).loads[1].shape == (2, 8)


def test_without_the_library_a_run_ends_with_the_way_out(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="torchtitan")
    monkeypatch.setattr("torchtitan.report.write.find_spec", lambda name: None)
    report_at_end(tmp_path)
    (line,) = caplog.messages
    assert "pip install plotly, then python scripts/report.py" in line
    assert report([str(tmp_path)]) == 2


def test_a_page_that_fails_does_not_fail_the_run(tmp_path, caplog):
    report_at_end(tmp_path)  # no records
    (line,) = caplog.messages
    assert "report.html can't be written" in line and "training continues" in line


def test_a_page_that_can_not_be_written_is_told_in_one_sentence(folder, tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    (tmp_path / "report.html").mkdir()
    report_at_end(tmp_path)
    (line,) = caplog.messages
    assert "report.html can't be written (Is a directory" in line and "--out" not in line


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, folder):
    other = tmp_path / "more" / "run"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    page = tmp_path / "both.html"
    assert report([str(folder), str(other), "--out", str(page)]) == 0
    assert f"Run {folder} and {other}" in page.read_text()


def test_unknown_path_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="doesn't exist"):
        read_run(tmp_path / "no")
