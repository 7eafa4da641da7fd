"""Renew the contract of the debug model: its losses as a file, and their picture in the docs.

python scripts/plot_losses.py outputs/metrics.jsonl        (needs matplotlib)
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPO = Path(__file__).parents[1]
LOSSES = REPO / "tests/assets/losses/deepseek_v3_debugmodel_cpu.txt"
PICTURE = REPO / "docs/debug_model_loss.png"
# Of the shipped text under the shipped tokenizer: torchtitan/hf_datasets/sample/README.md.
UNIGRAM_ENTROPY = 6.4340


def main(metrics: str) -> None:
    records = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    losses = [record["loss"] for record in records]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), (
        "one record for each step is needed: run with --metrics.log_freq 1 into a new folder"
    )
    LOSSES.parent.mkdir(parents=True, exist_ok=True)
    LOSSES.write_text("".join(f"{loss!r}\n" for loss in losses))
    draw(losses)


def draw(losses: list[float], window: int = 10) -> None:
    smooth = [
        sum(part) / len(part)
        for i in range(len(losses))
        if (part := losses[max(0, i - window + 1) : i + 1])
    ]
    steps = range(1, len(losses) + 1)
    figure, axes = plt.subplots(figsize=(7, 3.4), dpi=120)
    axes.plot(steps, losses, color="#b9c6d6", linewidth=1, label="loss of each step (512 tokens)")
    axes.plot(steps, smooth, color="#1f4e79", linewidth=1.8, label=f"mean of {window} steps")
    axes.axhline(UNIGRAM_ENTROPY, color="#b5482a", linestyle="--", linewidth=1)
    axes.text(2, UNIGRAM_ENTROPY - 0.09, "unigram entropy of the text", color="#b5482a", fontsize=8)
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title="DeepSeek-V3 debug model, two CPU processes",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main(*sys.argv[1:])
