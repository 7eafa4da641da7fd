"""Kill a training run at random moments, many times, and check that nothing is lost.

    python scripts/soak.py [--kills 30] [--ranks 2] [--seed 0] [options of torchtitan.train]

First the run is done undisturbed. Then the same command, in another folder, is started by
scripts/launch.py, and after a random time one of its ranks, all of them, or all with the launcher
are killed with SIGKILL; the command is repeated until enough kills are done, and once more to its
end. After every kill each complete checkpoint must be readable to the last byte, and at the end
every loss of every attempt must equal the undisturbed run's, bit for bit; else the exit code is 1.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("--kills", type=int, default=30, help="how many")
    parser.add_argument("--ranks", type=int, default=2, help="of the run")
    parser.add_argument("--steps", type=int, default=None, help="default: 10 for each kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, args.options = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    entry.check_first(parse)

# isort: split
from torchtitan.components.checkpoint.folder import damage, step_folder, steps_with_folder

LAUNCHER = Path(__file__).with_name("launch.py")
# A model that steps in milliseconds and saves after every second one, so that kills meet saves.
SETTINGS = {
    "model.args.n_layers": 2,
    "model.args.dim": 64,
    "model.args.n_heads": 2,
    "model.args.inter_dim": 64,
    "model.args.moe_inter_dim": 32,
    "training.seq_len": 32,
    "training.local_batch_size": 2,
    "training.dataset": "sample",
    "activation_checkpoint.mode": "none",
    "metrics.log_freq": 1,
    "debug.seed": 7,
    "checkpoint.enable": True,
    "checkpoint.interval": 2,
    "checkpoint.keep_latest_k": 3,
    "checkpoint.last_save_model_only": False,
    "checkpoint.async_mode": "async",
}


def start(folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    settings = SETTINGS | {"job.dump_folder": folder, "training.steps": args.steps}
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, LAUNCHER, "--standalone", "--nproc-per-node", str(args.ranks)]
    with open(folder / "log", "a") as log:
        run = subprocess.Popen(
            [*command, "-m", "torchtitan.train", *options, *args.options],
            stdout=log,
            stderr=log,
            env={"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ,
            start_new_session=True,  # Ctrl-C reaches only this script, which then ends the run
        )
    args.runs.callback(kill_all, run)
    return run


def kill_all(run: subprocess.Popen) -> None:
    """Kill the launcher and its ranks, if they still run."""
    ranks = ranks_of(run.pid)
    run.kill()
    run.wait()
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ranks_of(launcher: int) -> list[int]:
    """List the process ids of the launcher's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher:
            found.append(int(stat.parent.name))
    return found


def kill_some(run: subprocess.Popen, chooser: random.Random) -> str:
    """Send SIGKILL to one rank, to all, or to all and the launcher; return which."""
    ranks, kind = ranks_of(run.pid), chooser.choice(["one rank", "all ranks", "everything"])
    if not ranks:  # still starting
        kind = "everything"
    if kind == "one rank":
        ranks = [chooser.choice(ranks)]
    if kind == "everything":
        run.kill()
    for pid in ranks:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.wait(timeout=120)
    return kind


def whole_steps(folder: Path) -> list[int]:
    """List the steps of complete checkpoints; exit with a sentence where one is unreadable."""
    checkpoints = folder / "checkpoint"
    steps = [step for step, whole in steps_with_folder(checkpoints).items() if whole]
    for step in steps:
        problem = damage(step_folder(checkpoints, step))
        if problem:
            sys.exit(f"LOST: complete checkpoint of step {step} is unreadable: {problem}")
    return steps


def losses(folder: Path) -> dict[int, set[float]]:
    """Collect the losses of all attempts of the run, by step."""
    found: dict[int, set[float]] = {}
    for path in folder.glob("metrics*.jsonl"):  # the replaced ones, too
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], set()).add(record["loss"])
    return found


def soak(folder: Path, args: argparse.Namespace) -> int:
    chooser, kills, in_saves = random.Random(args.seed), 0, 0
    while kills < args.kills:
        before = max(whole_steps(folder), default=0)
        if before >= args.steps:
            sys.exit(f"the run ended after {kills} kills: set more --steps")
        run = start(folder, args)
        goal = before + chooser.randint(0, 6)
        while run.poll() is None and max(_complete(folder), default=0) < goal:
            time.sleep(0.02)
        time.sleep(chooser.uniform(0, 0.5))
        if run.poll() is not None:
            sys.exit(f"LOST: the run ended by itself with {run.returncode}: see {folder / 'log'}")
        kind = kill_some(run, chooser)
        kills += 1
        half_written = len(list((folder / "checkpoint").glob("*.tmp")))
        in_saves += half_written > 0
        after = max(whole_steps(folder), default=0)
        during = ", during a save" if half_written else ""
        print(f"kill {kills}: {kind}{during}; saved up to step {after}", flush=True)
    return in_saves


def _complete(folder: Path) -> list[int]:
    return [step for step, whole in steps_with_folder(folder / "checkpoint").items() if whole]


def main() -> None:
    args = parse(None)
    args.steps = args.steps or 10 * args.kills
    with tempfile.TemporaryDirectory(prefix="soak-") as name, contextlib.ExitStack() as args.runs:
        calm, disturbed = Path(name, "calm"), Path(name, "disturbed")
        calm.mkdir()
        disturbed.mkdir()
        if start(calm, args).wait() != 0:
            sys.exit((calm / "log").read_text())
        in_saves = soak(disturbed, args)
        if start(disturbed, args).wait() != 0:
            sys.exit((disturbed / "log").read_text())
        whole_steps(disturbed)
        expected, found = losses(calm), losses(disturbed)
        wrong = {step: values for step, values in found.items() if values != expected.get(step)}
        if wrong or found.keys() != expected.keys():
            sys.exit(f"LOST: losses differ in steps {sorted(wrong) or 'that are missing'}")
    print(
        f"nothing lost: {args.kills} kills ({in_saves} during a save), {args.steps} steps, every "
        "loss bit for bit, every complete checkpoint readable"
    )


if __name__ == "__main__":
    entry.run(main)
