"""Drawing tokens, ends of texts, and the cache against the model without one."""

import dataclasses

import pytest
import torch

from tests.unit_tests.components.checkpoint.test_convert import ARGS
from torchtitan.components import generation
from torchtitan.components.generation import Sampling, _Draw, generate
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.tools.errors import UserError

CPU = torch.device("cpu")
PROMPTS = [[5], [7, 8, 9, 10, 11, 12], [20, 21, 22]]


@pytest.fixture(scope="module")
def model() -> DeepSeekV3Model:
    torch.manual_seed(2)
    model = DeepSeekV3Model(dataclasses.replace(ARGS, init_std=0.3))
    model.init_weights()
    return model.train()


def write(model, prompts=PROMPTS, eos_id=None, **sampling) -> list[list[int]]:
    settings = Sampling(**({"max_new_tokens": 12} | sampling))
    return generate(
        model, prompts, settings, stop_ids=() if eos_id is None else (eos_id,), device=CPU
    )


def test_greedy_text_is_that_of_the_model_without_a_cache(model):
    model.eval()
    texts = write(model)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            logits = model(torch.tensor([tokens]))
            tokens.append(int(logits[0, -1].argmax()))
        assert text == tokens[len(prompt) :]
    model.train()


def test_a_prompt_in_several_passes_gives_the_same(model, monkeypatch):
    expected = write(model)
    monkeypatch.setattr(generation, "PREFILL", 2)
    assert write(model) == expected


def test_the_cache_is_gone_afterwards_and_the_model_trains_on(model):
    before = model(torch.tensor([[1, 2, 3]]))
    write(model)
    assert model.training
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), before)
    with pytest.raises(ZeroDivisionError), model.caching(1, 4):
        raise ZeroDivisionError
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), before)


def test_a_text_ends_before_its_end_token_and_the_others_go_on(model):
    free = write(model)
    eos = free[1][4]
    first = [text.index(eos) if eos in text else len(text) for text in free]
    assert 0 < min(first) < max(first)
    stopped = write(model, eos_id=eos)
    assert stopped == [text[:end] for text, end in zip(free, first, strict=True)]


def test_a_seed_repeats_and_a_text_does_not_depend_on_its_neighbours(model):
    drawn = write(model, temperature=1.0, seed=3)
    assert write(model, temperature=1.0, seed=3) == drawn
    assert write(model, temperature=1.0, seed=4) != drawn
    assert write(model, prompts=PROMPTS[:1], temperature=1.0, seed=3) == drawn[:1]


def test_tokens_are_drawn_as_often_as_temperature_and_top_p_say():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = probs.log().repeat(4000, 1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.6), (1.0, 0.75), (1.0, 1e-6)):
        expected = probs ** (1 / temperature)
        expected /= expected.sum()
        kept = int((expected.cumsum(0) - expected < top_p).sum())  # sorted already
        expected[kept:] = 0
        expected /= expected.sum()
        draw = _Draw(Sampling(temperature=temperature, top_p=top_p), 4000)
        counts = draw(logits).bincount(minlength=4) / 4000
        assert (counts - expected).abs().max() < 0.03, (temperature, top_p)
        assert (counts[kept:] == 0).all()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"temperature": -1.0}, "temperature = -1.0 must be a finite number, 0 or more."),
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0 and at most 1."),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be 1 or more."),
        ({"seed": -1}, "seed = -1 must be between 0 and 2**62."),
    ],
)
def test_senseless_settings_are_refused(changes, sentence):
    with pytest.raises(UserError) as caught:
        Sampling(**changes)
    assert str(caught.value) == sentence


def test_empty_and_too_long_prompts_are_refused(model):
    with pytest.raises(UserError, match="^prompt 2 has no tokens"):
        write(model, prompts=[[1], []])
    with pytest.raises(UserError, match="make 33 tokens, but the model has positions for 32"):
        write(model, prompts=[[1] * 21])


def test_the_coldest_draws_are_the_likeliest_tokens(model):
    assert write(model, temperature=1e-300) == write(model, temperature=1e-40) == write(model)
