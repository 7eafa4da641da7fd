"""Measure the effect of parts of the recipe on a toy V3 model, in 300 steps on the shipped text.

    python scripts/recipe_experiment.py outputs/recipe   (about 10 minutes on one core)

Trains six variants with the same data and seed, prints their last losses and max-violations, and
draws docs/recipe_balance.png (extra 'docs'). A variant whose records exist is not run again.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("folder", type=Path, help="for the runs, such as outputs/recipe")
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse)

# isort: split
from plot_losses import import_pyplot

from torchtitan.train import main as train

STEPS, LAST = 300, 50
PICTURE = Path(__file__).parents[1] / "docs/recipe_balance.png"
# A fourth of the debug model in each direction; sixteen experts, so that balancing matters. Biases
# move ten times as fast as in a run of months.
TOY = {
    "model.args.n_layers": 4,
    "model.args.dim": 128,
    "model.args.n_heads": 4,
    "model.args.inter_dim": 256,
    "model.args.moe_inter_dim": 64,
    "model.args.kv_lora_rank": 32,
    "model.args.qk_nope_head_dim": 32,
    "model.args.qk_rope_head_dim": 16,
    "model.args.v_head_dim": 32,
    "model.args.moe_args.num_experts": 16,
    "model.args.moe_args.num_shared_experts": 1,
    "model.args.moe_args.top_k": 2,
    "model.args.moe_args.load_balance_coeff": 0.01,
    "training.dataset": "sample",
    "training.seq_len": 128,
    "training.local_batch_size": 8,
    "training.steps": STEPS,
    "training.mixed_precision_param": "float32",
    "optimizer.lr": 3e-3,
    "lr_scheduler.warmup_steps": 20,
    "lr_scheduler.min_lr_factor": 0.1,
    "activation_checkpoint.mode": "none",
    "metrics.log_freq": 1,
    "debug.seed": 1,
}
VARIANTS = {
    "bias": {},
    "no balancing": {"model.args.moe_args.load_balance_coeff": "none"},
    "sequence loss only": {
        "model.args.moe_args.load_balance_coeff": "none",
        "model.args.moe_args.sequence_balance_coeff": 0.01,
    },
    "bias, MTP": {"model.args.n_mtp_layers": 1},
    "bias, bf16 states": {"optimizer.state_dtype": "bfloat16"},
    "bias, Muon": {"optimizer.name": "Muon"},
}


def main(argv: list[str] | None = None) -> None:
    folder = parse(argv).folder
    runs = {name: run(folder, name) for name in VARIANTS}
    print(f"{'':20} loss   max-violation (means of the last {LAST} steps; worst layer)")
    for name, records in runs.items():
        print(f"{name:20} {last(records, 'loss'):.4f} {last(records, 'max_violation'):.3f}")
    draw(runs)


def run(folder: Path, name: str) -> list[dict]:
    dump = folder / name.replace(",", "").replace(" ", "_")
    if len(read(dump)) < STEPS:
        options = [f"--{key}={value}" for key, value in (TOY | VARIANTS[name]).items()]
        code = train([*options, f"--job.dump_folder={dump}"])
        if code != 0:
            raise SystemExit(code)
    return read(dump)


def read(dump: Path) -> list[dict]:
    file = dump / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last(records: list[dict], key: str) -> float:
    return sum(record[key] for record in records[-LAST:]) / LAST


def draw(runs: dict[str, list[dict]], window: int = 10) -> None:
    plt = import_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=110)
    colours = ["#1f4e79", "#b5482a", "#d9a441", "#4f8a5b", "#7b5ea7", "#555555"]
    for colour, (name, records) in zip(colours, runs.items(), strict=True):
        for axes, key in ((left, "loss"), (right, "max_violation")):
            values = [record[key] for record in records]
            smooth = [
                sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window)
                for i in range(len(values))
            ]
            axes.plot(range(1, len(values) + 1), smooth, color=colour, linewidth=1.4, label=name)
    left.set(xlabel="step", ylabel="main loss (nats per token)", title="Loss")
    right.set(xlabel="step", ylabel="largest load / mean − 1", title="Max-violation, worst layer")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE)


if __name__ == "__main__":
    entry.run(main)
