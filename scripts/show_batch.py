"""Show the sequences that a run would train on, with the trained tokens marked.

    python scripts/show_batch.py train_configs/chat_debug_model.toml --batches 1 --html batch.html

In a terminal trained tokens are green; elsewhere they stand in [[ ]]. A line separates documents.
Any key of the config may follow, as on the trainer's command line.
"""

import argparse
import html
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.errors import UserError


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("config", help="TOML file of the run")
    parser.add_argument("--batches", type=int, default=1, help="batches to show (default: 1)")
    parser.add_argument("--html", type=Path, help="also write them to this file")
    return parser.parse_known_args(argv)


def check(argv: list[str] | None) -> tuple[argparse.Namespace, JobConfig]:
    """Return our own options and the run's settings. Raises `UserError` for impossible ones."""
    args, options = parse(argv)
    if args.batches < 1:
        raise UserError(f"--batches = {args.batches} must be at least 1.")
    return args, ConfigManager().parse_args(["--job.config_file", args.config, *options])


if __name__ == "__main__":
    entry.check_first(check)

# isort: split
import torch

from torchtitan.data.tokenizer import Tokenizer
from torchtitan.data.training import build_training_dataloader
from torchtitan.ops.attention import number_documents
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.script import run_script
from torchtitan.trainer.preflight import check_config

# A run of tokens of one document: (text, whether the model must say it).
Piece = tuple[str, bool]


def documents_of(example: dict[str, list[int]], tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """Yield the documents of a sequence, each as pieces."""
    places = [n for n, document in enumerate(example["documents"]) if document >= 0]
    for _, group in itertools.groupby(places, key=lambda n: example["documents"][n]):
        document = list(group)
        # The label of a place is the next token: the first token of a document has no place.
        said = [False] + [example["labels"][n] != IGNORE_INDEX for n in document]
        last = example["labels"][document[-1]]
        tokens = [example["input"][n] for n in document] + ([] if last == IGNORE_INDEX else [last])
        pairs = zip(tokens, said, strict=False)
        yield [
            (tokenizer.decode([token for token, _ in run]), trained)
            for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1])
        ]


def in_terminal(pieces: list[Piece], *, colour: bool) -> str:
    begin, end = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    return "".join(f"{begin}{text}{end}" if trained else text for text, trained in pieces)


def in_html(pieces: list[Piece]) -> str:
    texts = ((html.escape(text), trained) for text, trained in pieces)
    return "".join(f"<mark>{text}</mark>" if trained else text for text, trained in texts)


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Batch</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root {{ color-scheme: light dark }} body {{ font-family: sans-serif; max-width: 60em; margin: auto;
padding: 1em }} pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid gray;
padding-left: .6em }} mark {{ background: #2e7d3266; color: inherit }}
</style></head><body><h1>{title}</h1><p>Trained tokens are marked.</p>{body}</body></html>
"""


def describe(number: int, example: dict[str, list[int]]) -> str:
    """Describe how a sequence is filled, and how much of it is trained."""
    filled = sum(document >= 0 for document in example["documents"])
    trained = sum(label != IGNORE_INDEX for label in example["labels"])
    documents = len({document for document in example["documents"] if document >= 0})
    places = len(example["documents"])
    return (
        f"Sequence {number}: {documents} documents, {100 * filled / places:.1f} % filled, "
        f"{trained:,} of {filled:,} tokens trained ({100 * trained / max(1, filled):.1f} %)"
    )


def examples_of(config: JobConfig, tokenizer: Tokenizer, batches: int) -> Iterator[dict]:
    """Yield the sequences of the first batches, as lists by name."""
    loader = build_training_dataloader(
        config, tokenizer, dp_rank=0, dp_degree=1, seed=config.debug.seed or 0
    )
    for inputs, labels in itertools.islice(loader, batches):
        tokens = inputs["input"]
        documents = inputs.get("documents", number_documents(tokens, tokenizer.eos_id))
        for row in torch.stack((tokens, labels, documents), dim=1).tolist():
            yield dict(zip(("input", "labels", "documents"), row, strict=True))


def run(args: argparse.Namespace, config: JobConfig) -> None:
    _, _, tokenizer = check_config(config)
    colour, body = sys.stdout.isatty(), []
    marks = "are green" if colour else "stand in doubled square brackets"
    print(f"Trained tokens {marks}; --- begins a document.")
    for number, example in enumerate(examples_of(config, tokenizer, args.batches), start=1):
        title = describe(number, example)
        documents = list(documents_of(example, tokenizer))
        print(
            f"\n{title}", *(in_terminal(each, colour=colour) for each in documents), sep="\n---\n"
        )
        body += [f"<h2>{title}</h2>", *(f"<pre>{in_html(each)}</pre>" for each in documents)]
    if args.html is not None:
        try:
            args.html.write_text(PAGE.format(title=html.escape(args.config), body="".join(body)))
        except OSError as error:
            raise UserError(f"--html {args.html} can't be written ({error.strerror}).") from None


def main(argv: list[str] | None = None) -> int:
    return run_script(lambda: run(*check(argv)))


if __name__ == "__main__":
    entry.run(main)
