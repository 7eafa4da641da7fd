"""Generated text = transformers' greedy generation, token for token, in a batch of unequal lengths.

transformers generates each prompt alone, so that none of its own filling is trusted.
"""

import pytest
import torch
from transformers import PreTrainedModel

from tests.parity_tests import test_deepseek_hf, test_qwen3_hf
from tests.parity_tests.test_deepseek_hf import converted, needs_v2_mscale, v2, v2_lite, v3
from torchtitan.components.generation import Sampling, generate
from torchtitan.protocols.model import BaseModel

NEW = 64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def longer(monkeypatch) -> None:
    """The toy sizes, with room for the text."""
    monkeypatch.setitem(test_deepseek_hf.OUR_SIZES, "max_seq_len", 128)
    monkeypatch.setitem(test_deepseek_hf.THEIR_SIZES, "max_position_embeddings", 128)
    monkeypatch.setitem(test_qwen3_hf.SIZES, "max_position_embeddings", 128)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(v3(yarn=True), id="V3 with YaRN"),
        pytest.param(v2_lite(yarn=False), id="V2-Lite"),
        pytest.param(v2(), id="V2", marks=needs_v2_mscale),
    ],
)
def test_greedy_text_is_transformers(case, tmp_path):
    theirs = case.hf_model().eval()
    assert_writes_the_same(converted(case, theirs, tmp_path), theirs)


@pytest.mark.parametrize("kind", test_qwen3_hf.KINDS)
def test_greedy_text_of_qwen3_is_transformers(kind, tmp_path):
    theirs = test_qwen3_hf.hf_model(kind).eval()
    assert_writes_the_same(test_qwen3_hf.converted(theirs, tmp_path)[0], theirs)


def assert_writes_the_same(model: BaseModel, theirs: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (3, 17, 9)]
    texts = generate(model, prompts, Sampling(max_new_tokens=NEW), stop_ids=(), device=CPU)
    for prompt, text in zip(prompts, texts, strict=True):
        whole = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert text == whole[0, len(prompt) :].tolist()
        assert len(set(text)) > 2  # not one token for ever
