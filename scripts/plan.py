r"""Plan a run before it costs anything: does it fit, how fast will it be, what will it cost.

    python scripts/plan.py train_configs/deepseek_v3_671b.toml --world-size 2048 --hardware h800
    python scripts/plan.py CONFIG.toml --world-size 64 --sweep --html plan.html --json plan.json \
        --activation_checkpoint.mode full --training.local_batch_size 8

Every option of a training run goes, too, and wins over the file. Needs no GPU. How it computes, and
how to edit the hardware: docs/planning.md.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.planning.hardware import find_hardware
from torchtitan.tools.errors import UserError


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return our own options, and those left for the training run."""
    parser = argparse.ArgumentParser(description=entry.about(__doc__), allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG.toml", help="the run to plan")
    parser.add_argument("--world-size", type=int, required=True, help="GPUs")
    parser.add_argument("--hardware", default="h100", help="a row of hardware.toml (default: h100)")
    parser.add_argument(
        "--network-gbits",
        type=float,
        nargs="+",
        default=[],
        metavar="N",
        help="Gbit/s of each GPU's network; the first is planned, all compare dispatchers",
    )
    parser.add_argument("--phase", type=int, help="of [[schedule.phase]]; 0: its start; else all")
    parser.add_argument(
        "--routing-skew", type=float, help="largest load of an expert over the mean"
    )
    parser.add_argument("--routing-skew-from", metavar="FILE", help="metrics.jsonl of such a run")
    parser.add_argument("--tokens", type=float, help="of the whole run, for its cost")
    parser.add_argument("--sweep", action="store_true", help="compare layouts")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    return parser.parse_known_args(argv)


def check(argv: list[str] | None) -> tuple[argparse.Namespace, JobConfig]:
    """Return our own options and the run's settings. Raises `UserError` for impossible ones."""
    options, rest = parse(argv)
    if options.routing_skew is not None and options.routing_skew_from:
        raise UserError("--routing-skew and --routing-skew-from say the same: leave one out.")
    if options.routing_skew is not None and not 1 <= options.routing_skew <= 1000:
        raise UserError(
            f"--routing-skew {options.routing_skew:g} must be from 1 (all experts alike) to 1000."
        )
    if options.tokens is not None and not 0 < options.tokens < float("inf"):
        raise UserError(f"--tokens {options.tokens:g} must be above 0.")
    options.network_gbits = list(dict.fromkeys(options.network_gbits))
    for gbits in options.network_gbits:
        if not 0 < gbits < float("inf"):
            raise UserError(
                f"--network-gbits {gbits:g} must be a number above 0, the Gbit/s of each GPU."
            )
    for name in ("html", "json"):
        path: Path | None = getattr(options, name)
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UserError(f"--{name} {path}: make its folder first, or name another file.")
    options.hardware = find_hardware(options.hardware)
    config: JobConfig = ConfigManager().parse_args(["--job.config_file", options.config, *rest])
    return options, config


if __name__ == "__main__":
    entry.check_first(check, "--routing-skew-from")

# isort: split
from torchtitan.planning.advice import nearest_fit
from torchtitan.planning.page import page
from torchtitan.planning.plan import fullest, make_plan, plan_phases
from torchtitan.planning.report import as_data, phase_data, phase_lines, table
from torchtitan.planning.skew import read_skew
from torchtitan.planning.sweep import sweep, sweep_table
from torchtitan.tools.out_of_memory import host_is_full
from torchtitan.tools.script import run_script


def work(options: argparse.Namespace, config: JobConfig) -> None:
    networks = [options.hardware.on_network(gbits) for gbits in options.network_gbits]
    hardware = networks[0] if networks else options.hardware
    skew = options.routing_skew or 1.0
    if options.routing_skew_from:
        skew = read_skew(options.routing_skew_from)
    tokens, phases, phase = options.tokens, list[str](), options.phase or 0
    planned, data = None, dict[str, Any]()
    if config.schedule.phase and options.phase is None:
        by_phase = plan_phases(config, options.world_size, hardware, skew=skew)
        planned = fullest(by_phase).plan
        phase = planned.run.phase
        phases = phase_lines(by_phase, tokens)
        data = phase_data(by_phase, tokens)
        tokens = None  # their lines have the cost
        print("\n".join(phases), end="\n\n")
    if planned is None or networks:
        planned = make_plan(
            config, options.world_size, hardware, skew=skew, phase=phase, networks=networks
        )
    data = as_data(planned, tokens) | data
    print(table(planned, tokens))
    if not planned.fits:
        data["nearest_change"] = advice = nearest_fit(planned, skew)
        print(f"\n{advice}")
    rows = []
    if options.sweep:
        rows = sweep(config, options.world_size, hardware, skew=skew, phase=phase)
        data["sweep"] = [vars(row) for row in rows]
        print(f"\n{sweep_table(rows)}")
    if options.json:
        _write("--json", options.json, json.dumps(data, indent=1) + "\n")
    if options.html:
        _write("--html", options.html, page(planned, rows, tokens, phases))


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option} {path} can't be written ({error.strerror}).") from None


def plan(argv: list[str] | None) -> None:
    try:
        work(*check(argv))
    except (MemoryError, RuntimeError) as error:
        if not host_is_full(error):
            raise
        raise UserError(
            "this machine's memory is used up by the plan itself: plan fewer ranks "
            "(--world-size) or layers (--model.args.n_layers)."
        ) from None


def main(argv: list[str] | None = None) -> int:
    return run_script(lambda: plan(argv))


if __name__ == "__main__":
    entry.run(main)
