"""The chat tests' tokenizer folder."""

from pathlib import Path

import pytest

from tests.unit_tests.data.chat.families import load, write_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load(folder)
