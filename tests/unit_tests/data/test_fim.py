"""Fill in the middle: every text comes back whole, at the right rate, the same after a resume."""

import pytest

from tests.tiny_run import losses, tiny
from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from torchtitan.data.fim import FillInTheMiddle
from torchtitan.train import main

BEGIN, HOLE, END = 300, 301, 302
MARKS = {"<begin>": BEGIN, "<hole>": HOLE, "<end>": END}


class Marked(OneTokenAByte):
    def token_id(self, text: str) -> int | None:
        return MARKS.get(text)


def fim(rate: float, seed: int = 0) -> FillInTheMiddle:
    return FillInTheMiddle(Marked(), rate=rate, tokens=list(MARKS), seed=seed)


def put_together(ids: list[int]) -> str:
    """prefix + middle + suffix, from begin prefix hole suffix end middle."""
    hole, end = ids.index(HOLE), ids.index(END)
    assert ids[0] == BEGIN and hole < end
    return bytes(ids[1:hole] + ids[end + 1 :] + ids[hole + 1 : end]).decode()


TEXTS = [f"document {n}: " + "some words, é and all. " * (n % 7) for n in range(400)]


def test_each_text_is_all_there_in_another_order():
    for text in ["", "x", *TEXTS[:50]]:
        assert put_together(fim(1.0).encode(text)) == text
    whole = fim(1.0).encode("some text", add_bos=True, add_eos=True)
    plain = Marked().encode("", add_bos=True, add_eos=True)
    assert [whole[0], whole[-1]] == plain and whole[1] == BEGIN


def test_the_rate_is_kept_and_the_rest_is_untouched():
    ids = [fim(0.1).encode(text) for text in TEXTS]
    changed = [BEGIN in each for each in ids]
    assert 0.06 < sum(changed) / len(TEXTS) < 0.14
    for each, text, is_changed in zip(ids, TEXTS, changed, strict=True):
        assert is_changed or each == Marked().encode(text)


def test_seed_and_text_alone_decide():
    again = [fim(0.5).encode(text) for text in reversed(TEXTS)][::-1]
    assert again == [fim(0.5).encode(text) for text in TEXTS]
    assert again != [fim(0.5, seed=1).encode(text) for text in TEXTS]
    assert fim(0.5).identity() != fim(0.4).identity()


# The shipped tokenizer has no such tokens; any of its own may play them.
ROLES = '--training.fim_tokens=["a", "b", "c"]'


def test_a_run_with_it_resumes_with_the_same_bits(tmp_path):
    options = ["--training.fim_rate=0.5", ROLES, "--checkpoint.enable"]
    options += ["--checkpoint.last_save_model_only=false", "--lr_scheduler.min_lr_factor=1"]
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    assert main(tiny(plain, training__steps=2)) == 0
    assert main([*tiny(whole, training__steps=4), *options]) == 0
    assert main([*tiny(parts, training__steps=2), *options]) == 0
    assert main([*tiny(parts, training__steps=4), *options]) == 0
    assert losses(parts) == losses(whole)
    assert losses(whole)[:2] != losses(plain)


@pytest.mark.parametrize(
    "option, sentence",
    [
        ("--training.fim_rate=0.1", "the tokenizer has no token '<｜fim▁begin｜>'"),
        ("--training.fim_rate=1.5", "training.fim_rate = 1.5 must be between 0 and 1"),
        ('--training.fim_tokens=["a", "b"]', "must be three tokens: begin, hole and end"),
    ],
)
def test_what_can_not_be_is_one_sentence(tmp_path, capsys, option, sentence):
    assert main([*tiny(tmp_path), "--training.fim_rate=0.1", option]) == 2
    assert sentence in capsys.readouterr().err
