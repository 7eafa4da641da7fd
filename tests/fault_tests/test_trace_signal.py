"""SIGUSR2 to a rank of a running job: a trace of its next steps, and the run goes on."""

import json
import signal

from tests.fault_tests.processes import Run
from tests.tiny_run import records, tiny


def test_a_signal_takes_a_trace_and_the_run_goes_on(tmp_path):
    options = tiny(tmp_path, training__steps=60, profiling__profiler_warmup=1)
    with Run(options, 2, tmp_path / "log") as run:
        run.wait_for(tmp_path / "metrics.jsonl")
        run.wait_for_words("step:  3/60")
        run.kill(0, signal.SIGUSR2)
        assert run.exit_codes() == [0, 0], (tmp_path / "log").read_text()
    (trace,) = (tmp_path / "profile_traces").glob("iteration_*/rank0_trace.json")
    assert any(
        "mm" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]
    )
    assert records(tmp_path)[-1]["step"] == 60
    assert "SIGUSR2: recording until step" in (tmp_path / "log").read_text()
