"""Write the card of a published flavor: what was checked of it, docs/cards/FLAVOR.md and .json.

    python scripts/card.py 16B [--prove]

Takes seconds on a CPU. --prove also runs scripts/prove.py on the flavor's files in train_configs
(minutes); without it the proofs of the card that is there stay. Exit code 1: a check failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from scripts.cards.official import PUBLISHED
from torchtitan.tools.errors import UserError, suggest


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("flavor", metavar="FLAVOR", help="a published one, such as 16B")
    parser.add_argument("--prove", action="store_true", help="also prove its layouts (minutes)")
    parser.add_argument(
        "--out", type=Path, default=entry.REPO / "docs/cards", help="folder (default: docs/cards)"
    )
    return parser.parse_args(argv)


def check(argv: list[str] | None) -> argparse.Namespace:
    """Return the options. Raises `UserError` for a flavor that isn't published."""
    args = parse(argv)
    if args.flavor not in PUBLISHED:
        raise UserError(
            f"FLAVOR '{args.flavor}' is no published one{suggest(args.flavor, PUBLISHED)}"
        )
    return args


if __name__ == "__main__":
    entry.check_first(check)

# isort: split
import tomli
import torch
import transformers

import torchtitan
from scripts.cards.checks import Check, run_checks, sizes, subject_of
from scripts.cards.page import render
from scripts.cards.throughput import rows_of
from torchtitan.config import Model
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.script import run_script

FAMILIES = ("deepseek_v3", "qwen3")
# Other words for a flavor in docs/performance.md.
ALSO = {"671B": ["671B widths"], "Moonlight-16B-A3B": ["Moonlight"], "30B-A3B": ["Qwen3-30B-A3B"]}


def family_of(flavor: str) -> str:
    return next(name for name in FAMILIES if flavor in get_train_spec(name).model_args)


def make_card(flavor: str, proofs: list[dict[str, Any]]) -> dict[str, Any]:
    """Run the checks of a flavor and return its card.

    proofs: of its layouts.
    """
    family = family_of(flavor)
    with tempfile.TemporaryDirectory(prefix="card-") as folder:
        subject = subject_of(family, flavor, Path(folder))
        arguments = {key: ours for key, (ours, _) in sizes(subject).items()}
        checks: list[Check] = run_checks(subject)
    performance = (entry.REPO / "docs/performance.md").read_text(encoding="utf-8")
    return {
        "flavor": flavor,
        "family": family,
        "repo": get_train_spec(family).hf_repos[flavor],
        "versions": {
            "torchtitan-moe": torchtitan.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "checks": [asdict(check) for check in checks],
        "proofs": proofs,
        "throughput": rows_of(performance, [flavor, *ALSO.get(flavor, [])]),
        "arguments": arguments,
    }


def prove(flavor: str, family: str) -> list[dict[str, Any]]:
    """Prove the layouts of the flavor's files."""
    found = []
    for file in sorted((entry.REPO / "train_configs").glob("*.toml")):
        model = tomli.loads(file.read_text(encoding="utf-8")).get("model", {})
        if (model.get("name", Model().name), model.get("flavor")) != (family, flavor):
            continue
        command = [sys.executable, str(entry.REPO / "scripts/prove.py"), str(file)]
        env = os.environ | {"PYTHONPATH": str(entry.REPO)}
        run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        lines = run.stdout.splitlines() or run.stderr.splitlines() or ["no output"]
        layout = lines[0].rpartition(" for ")[2]
        result = lines[-1].rpartition(", ")[0] or lines[-1]
        found.append({"config": file.name, "layout": layout, "result": result})
        print(f"{file.name}: {lines[-1]}", flush=True)
    return found


def run(args: argparse.Namespace, failed: list[str]) -> None:
    family = family_of(args.flavor)
    file = args.out / f"{args.flavor}.json"
    there = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    proofs = prove(args.flavor, family) if args.prove else there.get("proofs", [])
    card = make_card(args.flavor, proofs)
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(render(card), encoding="utf-8")
    for check in card["checks"]:
        passed = check["figure"] <= check["limit"]
        print(f"{'passed' if passed else 'FAILED':8}{check['name']}: {check['text']}")
        failed += [] if passed else [check["name"]]
    failed += [proof["config"] for proof in proofs if not proof["result"].startswith("PROVED")]


def main(argv: list[str] | None = None) -> int:
    failed = list[str]()
    return run_script(lambda: run(check(argv), failed)) or int(bool(failed))


if __name__ == "__main__":
    entry.run(main)
