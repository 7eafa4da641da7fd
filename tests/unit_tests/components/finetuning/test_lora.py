"""Adapters and frozen parameters on one process: what is added, drawn, computed, and refused."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny_run import as_toml, tiny
from torchtitan.components.finetuning.trained import make_whole_model
from torchtitan.config import ConfigManager
from torchtitan.ops import lora as low_rank
from torchtitan.ops.linear import Joint, Linear, grouped_linear, linear_joint
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.train import main
from torchtitan.trainer.preflight import model_args_of

LORA = {"model__converters": '["lora"]', "lora__rank": 4}


def whole(**changes) -> BaseModel:
    config = ConfigManager().parse_args(tiny(Path("unused"), **changes))
    spec = get_train_spec(config.model.name)
    return make_whole_model(spec, model_args_of(config, spec, 32), config)


def trained(**changes) -> set[str]:
    return {name for name, p in whole(**changes).named_parameters() if p.requires_grad}


# ------------------------------------------------------------------ what is trained


def test_by_default_everything_is_trained():
    assert trained() == {name for name, _ in whole().named_parameters()}


def test_names_choose_what_is_trained_and_what_is_not():
    chosen = trained(
        training__trainable_fqns='["layers.*.attention.*", "norm.*"]',
        training__frozen_fqns='["*.kv_norm.weight"]',
    )
    assert "norm.weight" in chosen and "layers.0.attention.wo.weight" in chosen
    assert all(name.startswith("norm") or ".attention." in name for name in chosen)
    assert not any("kv_norm" in name for name in chosen)


def test_with_adapters_only_they_are_trained_and_what_is_named_beside():
    everywhere = trained(**LORA)
    assert everywhere and all(low_rank.is_adapter(name) for name in everywhere)
    more = trained(**LORA, training__trainable_fqns='["*norm.weight"]')
    assert more > everywhere and "norm.weight" in more
    less = trained(**LORA, training__frozen_fqns='["*lora_A"]')
    assert less == {name for name in everywhere if name.endswith("lora_B")}


def test_every_matrix_of_the_layers_is_adapted_in_fp32():
    model = whole(**LORA, training__dtype="bfloat16")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if low_rank.is_adapter(n)}
    matrices = {low_rank.matrix_of(name) for name in shapes}
    ends = {name.split(".", 2)[2] for name in matrices}
    attention = {f"attention.{each}" for each in ("wq", "wkv_a", "wkv_b", "wo")}
    feed_forwards = ("feed_forward", "moe.experts", "moe.shared_experts")
    assert ends == attention | {f"{ff}.w{n}" for ff in feed_forwards for n in (1, 2, 3)}
    assert not any("router" in name or "norm" in name for name in matrices)
    weights = dict(model.named_parameters())
    for name, (*stack, first, last) in shapes.items():
        *experts, out, into = weights[low_rank.weight_of(name)].shape
        assert stack == experts
        assert (first, last) == ((4, into) if name.endswith("lora_A") else (out, 4))
        assert weights[name].dtype == torch.float32


def test_ranks_by_name():
    table = [
        {"fqns": ["*.experts.w2"], "rank": 2},
        {"fqns": ["*.experts.*"], "rank": 3, "alpha": 1.0},
    ]
    model = whole(**LORA, lora__alpha=8, lora__override=as_toml(table))
    sizes = {n: p.shape[-2] for n, p in model.named_parameters() if n.endswith("lora_A")}
    assert sizes["layers.1.moe.experts.w2_lora_A"] == 2
    assert sizes["layers.1.moe.experts.w1_lora_A"] == 3
    assert sizes["layers.1.attention.wo.lora_A"] == 4
    scales = model.layers["1"].moe.experts.lora_scales
    assert scales == {"w1": 1 / 3, "w2": 4.0, "w3": 1 / 3}
    assert model.layers["1"].attention.wo.lora_scale == 2.0


# ------------------------------------------------------------------ initial values


def test_first_outputs_are_the_base_models_and_a_is_kaimings():
    torch.manual_seed(7)
    plain, adapted = (whole(**more).to_empty(device="cpu") for more in ({}, LORA))
    for model in (plain, adapted):
        model.init_weights()
    tokens = torch.randint(0, 200, (2, 32))
    with torch.no_grad():
        assert torch.equal(plain(tokens), adapted(tokens))
    for name, p in adapted.named_parameters():
        if name.endswith("lora_B"):
            assert not p.any()
        elif name.endswith("lora_A"):
            bound = 1 / math.sqrt(p.shape[-1])  # kaiming_uniform_(a=sqrt(5)), as PEFT has it
            assert p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


# ------------------------------------------------------------------ products


def filled(layer: Linear) -> Linear:
    for p in layer.parameters():
        nn.init.normal_(p)
    return layer


def test_all_doors_compute_the_merged_weight():
    x = torch.randn(5, 8, dtype=torch.float64)
    layers = [filled(Linear(8, out)) for out in (4, 6)]
    for layer in layers:
        layer.adapt(2, 3.0)
        filled(layer).double()
    merged = [
        layer.weight + 1.5 * layer.lora_B @ layer.lora_A  # 3 / 2
        for layer in layers
    ]
    joint = Joint("a", "b", dim=0)
    joint.tensor = torch.cat([layer.weight for layer in layers])
    for layer, weight, together in zip(layers, merged, linear_joint(x, joint, layers), strict=True):
        torch.testing.assert_close(layer(x), x @ weight.T)
        torch.testing.assert_close(together, x @ weight.T)
        exact = layer.dense_weight(torch.float64)
        torch.testing.assert_close(exact, weight, rtol=1e-6, atol=1e-6)  # made in fp32


@pytest.mark.parametrize("loop", [False, True])
def test_each_expert_has_its_adapter(loop):
    weight, a, b = (torch.randn(3, *shape) for shape in ((8, 4), (4, 4), (8, 4)))
    rows, counts = torch.randn(6, 4), torch.tensor([1, 0, 5])
    stack = low_rank.Adapted(weight, low_rank.LowRank(a, b, 0.5))
    out = grouped_linear(rows, stack, counts, loop=loop)
    expected = [
        row @ (weight[e] + 0.5 * b[e] @ a[e]).T
        for row, e in zip(rows, [0, 2, 2, 2, 2, 2], strict=True)
    ]
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ mistakes

OVERRIDE = "lora__override"
MISTAKES = {
    "pattern without match": (
        {"training__frozen_fqns": '["layers.*.attentoin.wo.weight"]'},
        'training.frozen_fqns: "layers.*.attentoin.wo.weight" matches no parameter',
    ),
    "trainable without match": (
        {"training__trainable_fqns": '["layer.*"]'},
        "training.trainable_fqns:",
    ),
    "nothing trainable": ({"training__frozen_fqns": '["*"]'}, "freezes all parameters"),
    "empty": ({"training__trainable_fqns": "[]"}, "must name parameters"),
    "rank 0": (LORA | {"lora__rank": 0}, "lora.rank = 0 must be 1 or more"),
    "alpha 0": (LORA | {"lora__alpha": 0}, "lora.alpha = 0.0 must be a finite number above 0"),
    "alpha below 0": (LORA | {"lora__alpha": -1}, "must be a finite number above 0"),
    "rank of an override": (
        LORA | {OVERRIDE: as_toml([{"fqns": ["*"], "rank": 0}])},
        "lora.override 1: rank = 0",
    ),
    "override of nothing": (LORA | {OVERRIDE: as_toml([{"fqns": ["*"]}])}, "changes nothing"),
    "override of what has no adapter": (
        LORA | {"lora__fqns": '["*.wo"]', OVERRIDE: as_toml([{"fqns": ["*.w2"], "rank": 2}])},
        "matches no matrix that lora.fqns",
    ),
    "no match": (LORA | {"lora__fqns": '["*.q_proj"]'}, 'lora.fqns: "*.q_proj" matches no matrix'),
    "norm": (LORA | {"lora__fqns": '["*_norm"]'}, "can't have an adapter"),
    "embedding": (LORA | {"lora__fqns": '["tok_embeddings"]'}, "names tok_embeddings, which can't"),
    "head": (LORA | {"lora__fqns": '["output"]'}, "names output, which can't"),
    "router": (LORA | {"lora__fqns": '["*.router.gate"]'}, "router.gate, which can't"),
    "dropout": (LORA | {"lora__dropout": 0.1}, "unknown key 'dropout'"),
    "no converter": ({"lora__rank": 8}, '[lora] is set, but model.converters does not name "lora"'),
    "Muon": (LORA | {"optimizer__name": "Muon"}, 'optimizer.name = "Muon" with model.converters'),
    "graph": (LORA | {"compile__cuda_graph": "true"}, "compile.cuda_graph = true"),
    "two types": (
        LORA | {"training__trainable_fqns": '["norm.*"]', "training__dtype": "bfloat16"},
        "all trained parameters need one type",
    ),
    "a group of frozen ones": (
        LORA | {"optimizer__group": as_toml([{"match": ["norm.*"], "lr_factor": 2.0}])},
        "matches no trained parameter",
    ),
    "MTP": (
        LORA
        | {
            "lora__fqns": '["mtp.*"]',
            "model__args.n_mtp_layers": 1,
            "checkpoint__enable": "true",
            "checkpoint__last_save_in_hf": "true",
        },
        "transformers has no layers of multi-token prediction",
    ),
    "no such folder": (LORA | {"lora__initial_load_path": "no/where"}, "no/where"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, tmp_path, capsys):
    options, sentence = MISTAKES[name]
    assert main(tiny(tmp_path, **options)) == 2
    said = capsys.readouterr().err
    assert sentence in said, said
    assert "Traceback" not in said and not any(tmp_path.iterdir())


def test_split_experts_have_no_adapters():
    split = {"parallelism__expert_tensor_parallel_degree": 2}
    with pytest.raises(UserError, match="expert_tensor_parallel_degree = 2 splits each expert"):
        whole(**LORA, **split)
    whole(**LORA, **split, lora__fqns='["*.attention.*"]')


def test_the_start_says_what_is_trained(tmp_path, capsys):
    assert main(tiny(tmp_path, **LORA, training__steps=1)) == 0
    said = capsys.readouterr().err
    line = re.search(r"Trained: ([\d,]+) of ([\d,]+) parameters .*", said)
    assert line, said
    model = whole(**LORA)
    sizes = [p.numel() for p in model.parameters()]
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert line[1] == f"{counted:,}" and line[2] == f"{sum(sizes):,}"
    assert "layers.*.attention, layers.*.feed_forward, layers.*.moe" in line[0]
    assert "frozen: tok_embeddings" in line[0]
    assert "LoRA: rank 4, alpha 32" in said
    assert "expert bias moves by load_balance_coeff" in said
