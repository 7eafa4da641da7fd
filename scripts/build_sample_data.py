"""Build the shipped text and tokenizer from Debian's copy of the Jargon File, or check them.

    python scripts/build_sample_data.py            # apt-get download, then write the three files
    python scripts/build_sample_data.py --check    # the same, but compare byte for byte
    python scripts/build_sample_data.py --package dict-jargon_4.4.7-3.1_all.deb    # no download

The text is the lexicon of the Jargon File 4.4.7 (public domain), one entry a document. A Debian
`dict-*` package holds a gzip file of all entries behind each other and an index of
"headword, offset, length" lines, the numbers written in base 64 (RFC 2229 servers read them so).
"""

import argparse
import collections
import gzip
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger, logger

PACKAGE = "dict-jargon"
ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "torchtitan/data/sample/sample.jsonl"
TOKENIZER = "tests/assets/tokenizer/tokenizer.json"
TOKENIZER_CONFIG = "tests/assets/tokenizer/tokenizer_config.json"
VOCAB_SIZE = 2048
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def main() -> int:
    init_logger()
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("--package", type=Path, help=f"a downloaded {PACKAGE} .deb file")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    try:
        built = build(args.package)
        return check(built) if args.check else write(built)
    except UserError as error:
        logger.error(str(error))
        return 2


def build(package: Path | None) -> dict[str, bytes]:
    """Build the contents of the files, by path below the repository."""
    with tempfile.TemporaryDirectory() as folder:
        documents = read_documents(unpack(package, Path(folder)))
    tokenizer = train_tokenizer(documents)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    bos, eos, pad = SPECIAL_TOKENS
    config = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    log_statistics(documents, tokenizer)
    return {
        SAMPLE: "".join(lines).encode(),
        TOKENIZER: (tokenizer.to_str(pretty=True) + "\n").encode(),
        TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def unpack(package: Path | None, folder: Path) -> Path:
    """Download the package (unless given) and unpack it; return the folder with jargon.index."""
    try:
        if package is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
            package = next(folder.glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "x")], check=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise UserError(
            f"The Debian package {package or PACKAGE} could not be fetched or unpacked ({error}); "
            "run this on a Debian machine after `apt-get update`, or name a .deb with --package."
        ) from error
    return folder / "x/usr/share/dictd"


def read_documents(folder: Path) -> list[str]:
    """Read the entries in the order of the file; each once, without the packager's notes
    (00-database)."""
    spans = set()
    for line in (folder / "jargon.index").read_text(encoding="utf-8").splitlines():
        headword, offset, length = line.split("\t")
        if not headword.startswith("00-database"):
            spans.add((from_base64(offset), from_base64(length)))
    data = gzip.decompress((folder / "jargon.dict.dz").read_bytes())
    return [clean(data[start : start + length].decode()) for start, length in sorted(spans)]


def from_base64(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + BASE64.index(digit)
    return value


def clean(entry: str) -> str:
    """Undo the indentation that the dictionary format adds: four spaces in the body, one above."""
    lines = []
    for line in entry.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        lines.append(line[min(indent, 4) :].rstrip())
    text = "\n".join(lines).strip()
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Train a byte-level BPE, which can encode any text. Special tokens are 0, 1, 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def log_statistics(documents: list[str], tokenizer: Tokenizer) -> None:
    """Log the numbers of sample/README.md; a test checks that they agree."""
    counts: collections.Counter[int] = collections.Counter()
    for text in documents:
        counts.update(tokenizer.encode(text).ids)
    ids = tokenizer.get_vocab()
    for special in SPECIAL_TOKENS[:2]:  # one begin and one end for each document
        counts[ids[special]] += len(documents)
    total = sum(counts.values())
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    size = sum(len(text.encode()) for text in documents)
    logger.info(
        f"{len(documents):,} documents, {size:,} bytes of text, {total:,} tokens with begin and "
        f"end, unigram entropy {entropy:.4f} nats"
    )


def write(built: dict[str, bytes]) -> int:
    for path, content in built.items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(content)
        logger.info(f"wrote {path} ({len(content):,} bytes)")
    return 0


def check(built: dict[str, bytes]) -> int:
    different = [
        path
        for path, content in built.items()
        if not (ROOT / path).is_file() or (ROOT / path).read_bytes() != content
    ]
    for path in different:
        logger.error(f"{path} is not what this script builds; run it without --check")
    if not different:
        logger.info("the committed files are what this script builds")
    return 1 if different else 0


if __name__ == "__main__":
    entry.run(main)
