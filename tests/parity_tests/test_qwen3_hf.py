"""Our Qwen3 with Hugging Face's weights is Hugging Face's: logits, loss, gradients; in and out.

Weights pass through files (`save_pretrained`), so names and layouts are those that people download.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from torchtitan.models.qwen3 import Qwen3Model, Qwen3StateDictAdapter, qwen3_args
from torchtitan.tools.errors import UserError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # 4 heads of 12 are not 32
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
MOE = {
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
KINDS = {
    "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE)),
}


def hf_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = KINDS[kind]()
    for name, param in model.named_parameters():
        # Large enough for scores, gates and attention to differ much from token to token.
        nn.init.normal_(param, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model


def saved(model: PreTrainedModel, folder: Path) -> tuple[dict[str, Tensor], dict]:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def converted(model: PreTrainedModel, folder: Path) -> tuple[Qwen3Model, Qwen3StateDictAdapter]:
    tensors, config = saved(model, folder)
    adapter = Qwen3StateDictAdapter(Qwen3StateDictAdapter.args_of(config))
    ours = Qwen3Model(adapter.model_args)
    ours.load_state_dict(adapter.from_hf(tensors), strict=True)
    return ours, adapter


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_are_hugging_faces(kind, tmp_path):
    theirs = hf_model(kind)
    ours, adapter = converted(theirs, tmp_path)
    tokens = torch.randint(0, 96, (2, 48), generator=torch.Generator().manual_seed(0))
    expected, logits = theirs(input_ids=tokens, labels=tokens), ours(tokens)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)

    loss.backward()
    expected.loss.backward()
    holder = copy.deepcopy(theirs)
    for slot, param in zip(holder.parameters(), theirs.parameters(), strict=True):
        slot.data = param.grad.clone()
    gradients = adapter.from_hf(saved(holder, tmp_path / "gradients")[0])
    named = dict(ours.named_parameters())
    assert named.keys() == gradients.keys()
    for name, param in named.items():
        assert param.grad.any(), name
        torch.testing.assert_close(param.grad, gradients[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_in_comes_out(kind, tmp_path):
    tensors, config = saved(hf_model(kind), tmp_path)
    adapter = Qwen3StateDictAdapter(Qwen3StateDictAdapter.args_of(config))
    again = adapter.to_hf(adapter.from_hf(tensors))
    assert again.keys() == tensors.keys() == {piece.name for piece in adapter.pieces()}
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    adapter.check_export()
    ours = adapter.hf_config()
    rebuilt = type(hf_model(kind).config)(**ours)
    assert Qwen3StateDictAdapter.args_of(rebuilt.to_dict()) == adapter.model_args


def test_numbers_of_parameters_are_the_published_ones():
    published = {"8B": 8.19e9, "14B": 14.77e9, "32B": 32.76e9, "30B-A3B": 30.53e9}
    published["235B-A22B"] = 235.09e9
    for flavor, expected in published.items():
        with torch.device("meta"):
            model = Qwen3Model(qwen3_args[flavor])
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=1e-3)


def test_the_export_says_how_many_tokens_change_experts(tmp_path):
    """Against choices made by hand: top-k of the gate on normalised Gaussian tokens."""
    model, adapter = converted(hf_model("experts"), tmp_path)
    state = {name: model.state_dict()[name] for name in adapter.router_names()}
    coarse = {n: t.to(torch.float8_e4m3fn).float() if "gate" in n else t for n, t in state.items()}
    changes = adapter.routing_changes(state, coarse)
    assert changes.keys() == {"layers.0", "layers.1"}
    x = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0))
    x = F.rms_norm(x, (32,)) * state["layers.1.ffn_norm.weight"]
    before, after = (
        (x @ each["layers.1.moe.router.gate.weight"].T).topk(3).indices.sort().values
        for each in (state, coarse)
    )
    share = (before != after).any(dim=-1).float().mean().item()
    assert 0.005 < share < 0.9 and changes["layers.1"] == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"head_dim": None}, "config.json has a value of the wrong type"),
        ({"hidden_size": "32"}, "config.json has a value of the wrong type"),
        ({"vocab_size": ...}, "config.json lacks 'vocab_size'"),
    ],
)
def test_a_config_that_cannot_be_read_is_told(changes, sentence):
    config = Qwen3Config(**SIZES).to_dict() | changes
    config = {name: value for name, value in config.items() if value is not ...}
    with pytest.raises(UserError, match=sentence):
        Qwen3StateDictAdapter.args_of(config)


def test_a_tied_embedding_is_refused(tmp_path):
    config = {**Qwen3Config(**SIZES).to_dict(), "tie_word_embeddings": True}
    with pytest.raises(UserError, match="tie_word_embeddings = True, but this architecture"):
        Qwen3StateDictAdapter.args_of(config)
