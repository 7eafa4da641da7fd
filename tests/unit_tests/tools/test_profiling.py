"""Traces hold the steps they promise; snapshots come when and where they should."""

import json
import pickle
from contextlib import closing

import pytest
import torch

from torchtitan.tools.errors import UserError
from torchtitan.tools.profiling import RequestedTraces, maybe_memory_snapshot, maybe_profile

# torch warns once that a trace holds its own steps only, which is what we want.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def profile(folder, *, steps, start_step=0, **changes):
    settings = dict(
        enable_profiling=True,
        dump_folder=folder,
        save_traces_folder="profile_traces",
        profile_freq=4,
        profiler_active=2,
        profiler_warmup=1,
        rank=3,
    )
    with maybe_profile(**{**settings, **changes}, start_step=start_step) as profiler:
        for step in range(start_step + 1, start_step + steps + 1):
            with torch.profiler.record_function(f"work_of_step_{step}"):
                torch.ones(4).sum()
            profiler.step()


def steps_in(trace):
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    return sorted(int(name.rsplit("_", 1)[1]) for name in names if name.startswith("work_of_step"))


def traces_in(folder):
    return {trace.parent.name: steps_in(trace) for trace in folder.rglob("rank3_trace.json")}


def test_each_trace_holds_the_active_steps_that_end_at_its_iteration(tmp_path):
    profile(tmp_path, steps=10)
    # Steps 9 and 10 begin a third trace that never ends: not written.
    assert traces_in(tmp_path / "profile_traces") == {"iteration_4": [3, 4], "iteration_8": [7, 8]}


def test_iterations_of_a_resumed_run_go_on_counting(tmp_path):
    profile(tmp_path, steps=7, start_step=101)
    assert traces_in(tmp_path) == {"iteration_104": [103, 104], "iteration_108": [107, 108]}


def test_half_a_trace_is_removed_and_said_and_profiling_goes_on(tmp_path, monkeypatch, caplog):
    """torch's writer says nothing when the disk is full. Without a pause between traces, an error
    that reached torch's profiler was a segmentation fault."""
    export = torch.profiler.profile.export_chrome_trace

    def half(self, path):
        export(self, path)
        if "iteration_8" not in path:
            with open(path, "r+b") as file:
                file.truncate(100)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)
    profile(tmp_path, steps=13, profiler_warmup=3, profiler_active=1)
    assert traces_in(tmp_path) == {"iteration_8": [8]}
    said = [text for text in caplog.messages if "The trace for" in text]
    assert [text.partition("profile_traces ")[2][:25] for text in said] == [
        "can't be written (Input/o",
        "can be written again",
        "can't be written (Input/o",
    ]


def test_a_folder_of_traces_that_can_not_be_made_ends_nothing(tmp_path, caplog):
    (tmp_path / "profile_traces").write_text("in the way")
    profile(tmp_path, steps=13, profiler_warmup=3, profiler_active=1)
    assert caplog.text.count("can't be written (") == 1


def test_switched_off_writes_nothing(tmp_path):
    profile(tmp_path, steps=8, enable_profiling=False)
    snapshot(tmp_path, steps=8, enable_memory_snapshot=False)
    assert list(tmp_path.iterdir()) == []


def test_more_recorded_steps_than_steps_is_refused(tmp_path):
    with pytest.raises(UserError, match="profile_freq = 4 .*profiler_active = 5"):
        profile(tmp_path, steps=1, profiler_active=4)


def snapshot(folder, *, steps, start_step=0, enable_memory_snapshot=True, fail_at=None):
    with maybe_memory_snapshot(
        enable_memory_snapshot=enable_memory_snapshot,
        dump_folder=folder,
        save_memory_snapshot_folder="memory_snapshot",
        profile_freq=4,
        start_step=start_step,
        rank=3,
    ) as snapshots:
        for step in range(start_step + 1, start_step + steps + 1):
            if step == fail_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if enable_memory_snapshot and torch.version.cuda is not None:
                torch.zeros(1024, device="cuda")
            snapshots.step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_snapshot_without_cuda_is_refused(tmp_path):
    with pytest.raises(UserError, match="enable_memory_snapshot = true needs a CUDA device"):
        snapshot(tmp_path, steps=1)


def folders_in(folder):
    return {path.parent.name for path in folder.rglob("rank3_memory_snapshot.pickle")}


@pytest.fixture
def allocator_calls(monkeypatch):
    """The three torch calls recorded, so that when and where can be checked without a GPU."""
    calls = []
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    memory = torch.cuda.memory
    record = lambda enabled="all", **_: calls.append(enabled)  # noqa: E731
    monkeypatch.setattr(memory, "_record_memory_history", record)
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: open(path, "w").close())
    return calls


def test_snapshots_each_profile_freq_steps_and_stops_recording(tmp_path, allocator_calls):
    snapshot(tmp_path, steps=9, start_step=2)
    assert folders_in(tmp_path / "memory_snapshot") == {"iteration_4", "iteration_8"}
    assert allocator_calls == ["all", None]


def test_out_of_memory_leaves_a_snapshot_of_the_failed_step(tmp_path, allocator_calls):
    with pytest.raises(torch.OutOfMemoryError):
        snapshot(tmp_path, steps=9, fail_at=6)
    assert folders_in(tmp_path) == {"iteration_4", "iteration_6_out_of_memory"}
    assert allocator_calls == ["all", None]


def test_a_snapshot_that_can_not_be_written_does_not_hide_that_memory_ran_out(
    tmp_path, allocator_calls, caplog
):
    (tmp_path / "memory_snapshot").write_text("in the way")
    with pytest.raises(torch.OutOfMemoryError):
        snapshot(tmp_path, steps=9, fail_at=6)
    assert caplog.text.count("can't be written (") == 1


def test_an_allocator_without_history_ends_no_run(tmp_path, allocator_calls, caplog, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("cudaMallocAsync does not yet support recordHistory")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", refuse)
    snapshot(tmp_path, steps=3)
    assert caplog.text.count("does not yet support recordHistory") == 1


@needs_cuda
def test_a_real_snapshot_can_be_read(tmp_path):
    snapshot(tmp_path, steps=4)
    (path,) = tmp_path.rglob("rank3_memory_snapshot.pickle")
    with path.open("rb") as file:
        assert any(
            event["action"] == "alloc" and event["size"] >= 4096
            for trace in pickle.load(file)["device_traces"]
            for event in trace
        )


# ---------------------------------------------------------------- on request


def requested(folder, asked_at, *, steps, **changes):
    """Run steps, with a trace asked for in some of them."""
    wanted = []
    settings = dict(active=2, warmup=1, start_step=100, rank=3) | changes
    traces = RequestedTraces(
        lambda: bool(wanted and wanted.pop()), folder, folder / "snapshots", **settings
    )
    with closing(traces):
        for step in range(101, 101 + steps):
            with torch.profiler.record_function(f"work_of_step_{step}"):
                torch.ones(4).sum()
            if step in asked_at:
                wanted.append(True)
            traces.step()


def test_a_request_takes_a_trace_of_the_next_steps(tmp_path):
    requested(tmp_path, {102, 108}, steps=12)
    # 103 warms up; a second request takes a second trace.
    assert traces_in(tmp_path) == {"iteration_105": [104, 105], "iteration_111": [110, 111]}


def test_a_request_while_one_is_taken_counts_as_the_same(tmp_path):
    requested(tmp_path, {102, 103}, steps=12)
    assert list(traces_in(tmp_path)) == ["iteration_105"]


def test_a_request_waits_until_another_profiler_is_past(tmp_path):
    requested(tmp_path, {102}, steps=12, busy_freq=5)  # 105: so from 105 on, for 106 to 108
    assert traces_in(tmp_path) == {"iteration_108": [107, 108]}


def test_a_trace_that_is_not_finished_at_the_end_is_not_written(tmp_path):
    requested(tmp_path, {102}, steps=3)
    assert traces_in(tmp_path) == {}


@pytest.mark.parametrize("changes", [{"scheduled": True}, {"busy_freq": 3}])
def test_a_request_that_cannot_be_met_is_refused_in_a_sentence(tmp_path, caplog, changes):
    requested(tmp_path, {102}, steps=12, **changes)
    assert traces_in(tmp_path) == {}
    assert caplog.messages and caplog.messages[0].startswith("SIGUSR2: ")


@needs_cuda
def test_a_request_on_cuda_also_takes_a_memory_snapshot(tmp_path):
    requested(tmp_path, {102}, steps=8)
    assert (tmp_path / "snapshots/iteration_105/rank3_memory_snapshot.pickle").exists()
