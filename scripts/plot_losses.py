"""Update the reference losses of the debug model, and their picture in the docs.

python scripts/plot_losses.py outputs/metrics.jsonl        (needs matplotlib, extra 'docs')
"""

import json
import math
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

REPO = Path(__file__).parents[1]
LOSSES = REPO / "tests/assets/losses/deepseek_v3_debugmodel_cpu.txt"
PICTURE = REPO / "docs/debug_model_loss.png"
# Entropy of the shipped text under the shipped tokenizer: torchtitan/data/sample/README.md.
UNIGRAM_ENTROPY = 6.4340


def main(arguments: list[str]) -> None:
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(arguments) != 1:
        refuse("Give the path of one metrics.jsonl, for example outputs/metrics.jsonl.")
    losses = read_losses(Path(arguments[0]))
    draw(losses)
    LOSSES.parent.mkdir(parents=True, exist_ok=True)
    LOSSES.write_text("".join(f"{loss!r}\n" for loss in losses))


def refuse(sentence: str) -> NoReturn:
    """Exit with a user error: a sentence and code 2, as torchtitan.train."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def read_losses(path: Path) -> list[float]:
    """Read the loss of each step from 1 on."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [record["step"] for record in records]
        losses = [float(record["loss"]) for record in records]
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror}); correct the path.")
    except (ValueError, KeyError, TypeError):
        refuse(
            f"{path} is not a metrics.jsonl (each line a JSON object with 'step' and 'loss'); give "
            "the one that a run wrote into its job.dump_folder."
        )
    if not steps or steps != list(range(1, len(steps) + 1)):
        refuse(
            f"{path} does not have one record for each step from 1 on (found {_short(steps)}); run "
            "with --metrics.log_freq 1 into a new --job.dump_folder."
        )
    for step, loss in zip(steps, losses, strict=True):
        if not math.isfinite(loss):
            refuse(f"{path} has the loss {loss} at step {step}; give a run that went well.")
    return losses


def _short(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (", ..." if len(steps) > 5 else "") or "none"


def draw(losses: list[float], window: int = 10) -> None:
    plt = import_pyplot()
    smooth = [
        sum(part) / len(part)
        for i in range(len(losses))
        if (part := losses[max(0, i - window + 1) : i + 1])
    ]
    steps = range(1, len(losses) + 1)
    figure, axes = plt.subplots(figsize=(7, 3.4), dpi=120)
    axes.plot(steps, losses, color="#b9c6d6", linewidth=1, label="loss of each step (2,048 tokens)")
    axes.plot(steps, smooth, color="#1f4e79", linewidth=1.8, label=f"mean of {window} steps")
    axes.axhline(UNIGRAM_ENTROPY, color="#b5482a", linestyle="--", linewidth=1)
    axes.text(
        60, UNIGRAM_ENTROPY + 0.06, "unigram entropy of the text", color="#b5482a", fontsize=8
    )
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title="DeepSeek-V3 debug model, two CPU processes",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE)


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        refuse("matplotlib is not installed; run pip install matplotlib.")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


if __name__ == "__main__":
    entry.run(main, sys.argv[1:])
