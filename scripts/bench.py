r"""Benchmark a whole training step or single kernels, with peers side by side: table and JSON.

    python scripts/bench.py step --job.config_file train_configs/debug_model.toml
    python scripts/bench.py step --preset 16b8-b4-fp32 --peers torchtitan transformers+liger
    python scripts/bench.py kernels --widths 16B 671B
    torchrun --nproc_per_node 2 scripts/bench.py step --preset 16b8-b4-fp32 \
        --parallelism.expert_parallel_degree 2
    python scripts/bench.py presets

`step` takes every option of a training run and trains on random tokens, on one device or, under
torchrun, in a layout of several: its rows are rank 0's, with the tokens/s and FLOPS of one device.
benchmarks/breakdown.py explains the parts of a breakdown, docs/performance.md the tables.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.config import ConfigManager
from torchtitan.tools.errors import RunError, UserError, suggest

# isort: split
from benchmarks.presets import MEAN_DOCUMENT, NO_FILES, PRESETS

KERNELS = ("moe", "core", "head", "router", "norm", "rope", "optimizer")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the script's own options; also return those left for the training run."""
    parser = argparse.ArgumentParser(description=entry.about(__doc__), allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="the whole step", allow_abbrev=False)
    step.add_argument("--preset", nargs="+", default=[], metavar="NAME", help="see `presets`")
    step.add_argument("--peers", nargs="+", default=[], metavar="NAME", help="peers to run, too")
    step.add_argument("--torchtitan_site", type=Path, help="folder with torchtitan 0.2.2")
    step.add_argument("--warmup", type=_positive, default=5, help="steps that don't count")
    step.add_argument("--steps", type=_positive, default=10, help="steps that are timed")
    step.add_argument("--peer_seconds", type=float, default=300, help="after which a peer is ended")
    mean = {"type": _positive, "default": MEAN_DOCUMENT, "metavar": "TOKENS"}
    step.add_argument("--document", **mean, help="mean length, where masks end at documents")
    step.add_argument("--no_breakdown", action="store_true", help="leave torch.profiler out")
    kernels_parser = commands.add_parser("kernels", help="single operations", allow_abbrev=False)
    _add_kernel_arguments(kernels_parser)
    commands.add_parser("presets", help="list the cases of docs/performance.md")
    for command in (step, kernels_parser):
        command.add_argument("--out", type=Path, help="JSON file for all rows")
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "step":
        parser.error(f"unknown options: {' '.join(rest)}")
    return options, rest


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _add_kernel_arguments(parser: argparse.ArgumentParser) -> None:
    flavors = {"nargs": "+", "default": ["16B", "671B"], "metavar": "FLAVOR"}
    parser.add_argument("--widths", **flavors, help="flavors whose sizes are timed")
    names = {"nargs": "+", "default": list(KERNELS), "choices": KERNELS, "metavar": "NAME"}
    parser.add_argument("--kernels", **names, help="which to time")
    parser.add_argument("--tokens", type=int, default=16384, help="of a pass")
    parser.add_argument("--seq_len", type=int, default=4096, help="of the core's sequences")
    parser.add_argument("--reps", type=int, default=20, help="timed, after three to warm up")
    parser.add_argument("--vocab", type=int, default=129280, help="of linear + cross-entropy")
    parser.add_argument("--params", type=float, default=0.5, help="of the optimizer, in 1e9")
    parser.add_argument("--eager", action="store_true", help="don't compile what a run compiles")


def check(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return what `parse` does. Raises `UserError` for impossible options, the training run's
    included."""
    options, rest = parse(argv)
    if options.command == "step":
        for name in options.preset:
            if name not in PRESETS:
                raise UserError(f"--preset: '{name}' is not a preset{suggest(name, PRESETS)}")
        ConfigManager().parse_args([*rest, *NO_FILES])
    if options.command != "presets" and options.out and not options.out.absolute().parent.is_dir():
        raise UserError(f"--out {options.out}: make its folder first, or name another file.")
    return options, rest


if __name__ == "__main__":
    entry.check_first(check, "--torchtitan_site")

# isort: split
import torch
from benchmarks import kernels, our_step, peers
from benchmarks.breakdown import PARTS

from torchtitan.tools.logging import init_logger, logger


def main(argv: list[str] | None = None) -> int:
    """Run the script. Returns the exit code: 0 done, 1 the run failed, 2 user error."""
    init_logger()
    try:
        options, rest = check(argv)
        if options.command == "presets":
            print("\n".join(f"{name}: {' '.join(args)}" for name, args in PRESETS.items()))
            return 0
        if options.command == "kernels":
            rows = kernels.run(options)
            text = kernels.table(rows)
        else:
            rows = steps(options, rest)
            text = step_table(rows)
    except (UserError, RunError) as error:
        logger.error("%s", error)
        return 2 if isinstance(error, UserError) else 1
    if int(os.environ.get("RANK", 0)) > 0:
        return 0
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(text)
    return 0


# ------------------------------------------------------------------------------------ whole steps


def steps(options: argparse.Namespace, rest: list[str]) -> list[dict]:
    """Measure the rows of all presets, ours, then the peers'; several presets in a process each."""
    peers.check_peers(options.peers, options.torchtitan_site)
    if len(options.preset) > 1:
        if "RANK" in os.environ:
            raise UserError(
                "--preset: under torchrun, only one preset is supported; run torchrun for each."
            )
        return [row for name in options.preset for row in _apart(name, options, rest)]
    name = options.preset[0] if options.preset else "-"
    arguments = [*PRESETS.get(name, []), *rest, *NO_FILES]
    settings = our_step.settings_of(
        arguments, warmup=options.warmup, steps=options.steps, document=options.document
    )
    rows = [our_step.run(arguments, settings, profile=not options.no_breakdown)]
    if torch.cuda.is_available():  # the peers want the whole card
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    rows += [
        peers.run_peer(
            peer,
            settings,
            torchtitan_site=options.torchtitan_site,
            seconds=options.peer_seconds,
        )
        for peer in options.peers
    ]
    return [{"case": name} | row for row in rows]


def _apart(preset: str, options: argparse.Namespace, rest: list[str]) -> list[dict]:
    """Measure a preset in a process of its own, without memory or compiled code of others."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, __file__, "step", "--preset", preset, "--out", str(out)]
        command += [
            f"--{name}={getattr(options, name)}" for name in ("warmup", "steps", "document")
        ]
        command += [f"--peer_seconds={options.peer_seconds}"]
        command += ["--no_breakdown"] * options.no_breakdown
        if options.torchtitan_site:
            command += ["--torchtitan_site", str(options.torchtitan_site)]
        if options.peers:
            command += ["--peers", *options.peers]
        done = subprocess.run([*command, *rest], stdout=subprocess.DEVNULL, check=False)
        if out.exists():
            return json.loads(out.read_text())
        failed = f"exit code {done.returncode}; see its message above"
        return [{"case": preset, "name": "ours", "failed": failed}]


def step_table(rows: list[dict]) -> str:
    """Format speed and memory of all rows, then the parts of our rows."""
    lines = ["case               name                 tokens/s  (q1-q3)         TFLOPS  MFU%   GiB"]
    for row in rows:
        start = f"{row['case']:18} {row['name']:19}"
        if "tokens_per_second" not in row:
            lines.append(f"{start} {row.get('missing') or 'failed: ' + row['failed']}")
            continue
        speed = row["tokens_per_second"]
        spread = f"({speed['q1']:,.0f}-{speed['q3']:,.0f})"
        mfu = "-" if row["mfu_percent"] is None else f"{row['mfu_percent']:.1f}"
        lines.append(
            f"{start} {speed['median']:9,.0f}  {spread:17} {row['tflops']:5,.1f} {mfu:>5} "
            f"{row['peak_gib']:5.1f}  loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
        )
    for row in rows:
        if "breakdown" in row:
            parts = row["breakdown"]["ms"]
            listed = ", ".join(f"{part} {parts[part]:.1f}" for part in PARTS)
            lines.append(f"{row['case']}, ms of {sum(parts.values()):.1f}: {listed}")
    where = next((row["machine"] for row in rows if "machine" in row), None)
    return "\n".join([*lines, json.dumps(where)])


if __name__ == "__main__":
    entry.run(main)
