"""What the data tests share: the shipped tokenizer, files to read, and the log lines."""

import json
import logging
from pathlib import Path

import pytest

from torchtitan.data.tokenizer import load_tokenizer
from torchtitan.tools.logging import logger

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(ASSETS / "tokenizer"))


@pytest.fixture
def jsonl(tmp_path):
    """jsonl("a.jsonl", ["text", ...]) writes documents and gives the path."""

    def write(name: str, texts: list) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def log():
    """The messages that the package logs, whatever handlers are set up."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)
