"""Runs with adapters or frozen parameters train like one process in every layout.

The one process is plain: an adapted weight is W + alpha / rank · B A, computed anew in each pass,
and its gradients are autograd's.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.distributed_tests.test_layouts import (
    ALL_GATHER,
    COMPILED,
    layout,
    pipeline,
)
from tests.distributed_tests.training_ranks import (
    MODEL,
    SEQ_LEN,
    assert_trained_alike,
    config_of,
    train_alone,
    train_on_this_rank,
)
from torchtitan.components.finetuning.trained import make_whole_model
from torchtitan.models.deepseek_v3 import deepseekv3_args
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import device_type

LORA = (
    '--model.converters=["lora"]',
    "--lora.rank=4",
    "--lora.alpha=8",
    '--lora.override=[{ fqns = ["*.experts.*"], rank = 2 }]',
)
FROZEN = (
    '--training.frozen_fqns=["*.moe.router.*", "layers.0.*", "tok_embeddings.*", "*.wkv_b.*", '
    '"*.experts.w3"]',
)
# Of a pipeline's first stage nothing is trained.
HEAD = ('--training.trainable_fqns=["output.*", "norm.*"]',)

LAYOUTS = {
    "one process": layout(1),
    "one process, recomputed, accumulation": layout(1, ac="full", accumulation=2),
    "FSDP 2": layout(2),
    "FSDP 2, compiled, recomputed": layout(2, *COMPILED, ac="full"),
    "DDP 2": layout(2, replicate=2, shard=1),
    "EP 2": layout(2, ep=2),
    "EP 2, gathered": layout(2, ALL_GATHER, ep=2),
    "EP 2, FSDP 2, recomputed": layout(4, ep=2, ac="full"),
    "TP 2": layout(2, tp=2),
    "TP 2, FSDP 2, EP 2": layout(4, tp=2, ep=2),
    "CP 2": layout(2, cp=2),
    "PP 2": layout(2, pp=2),
    "PP 2, InterleavedZeroBubble, EP 2": layout(
        4, *pipeline("InterleavedZeroBubble", 4), pp=2, ep=2
    ),
}


class Product(nn.Module):
    """W + scale · B A."""

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.b @ self.a


def adapt_plainly(model: nn.Module) -> None:
    ours = whole_model(*LORA)
    state = ours.state_dict()
    for name, tensor in state.items():
        if not name.endswith("lora_A"):
            continue
        rank = 2 if "moe.experts" in name else 4
        stem = name.removesuffix("lora_A")[:-1]
        weight = stem if "moe.experts" in name else f"{stem}.weight"
        module, _, attribute = weight.rpartition(".")
        b = state[name.removesuffix("A") + "B"]
        product = Product(tensor.clone(), b.clone(), 8 / rank)
        parametrize.register_parametrization(model.get_submodule(module), attribute, product)
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith((".a", ".b")))


def whole_model(*options: str) -> nn.Module:
    config = config_of(*options)
    spec = get_train_spec("deepseek_v3")
    args = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=MODEL, seq_len=SEQ_LEN)
    # A GPU draws other weights than a CPU.
    model = make_whole_model(spec, args, config).to_empty(device=device_type())
    torch.manual_seed(7)
    model.init_weights()
    return model


def our_name(name: str) -> str:
    """layers.0.attention.wq.parametrizations.weight.0.a is our layers.0.attention.wq.lora_A."""
    if "parametrizations" not in name:
        return name
    module, rest = name.split(".parametrizations.")
    attribute, *end = rest.split(".")
    if end == ["original"]:
        return f"{module}.{attribute}"
    factor = f"lora_{end[-1].upper()}"
    return f"{module}.{factor}" if attribute == "weight" else f"{module}.{attribute}_{factor}"


@pytest.fixture(scope="module")
def adapted() -> dict:
    result = train_alone(adapt_plainly)
    return result | {"state": {our_name(n): t for n, t in result["state"].items()}}


def of_frozen(name: str) -> bool:
    of_first = name.startswith(("layers.0.", "tok_embeddings."))
    return of_first or ".router." in name or ".wkv_b." in name or name.endswith("experts.w3")


def of_body(name: str) -> bool:
    return not name.startswith(("output.", "norm."))


def trained_but(is_frozen: Callable[[str], bool]) -> dict:
    def prepare(model: nn.Module) -> None:
        for name, param in model.named_parameters():
            param.requires_grad_(not is_frozen(name))

    return train_alone(prepare)


@pytest.fixture(scope="module")
def frozen() -> dict:
    return trained_but(of_frozen)


@pytest.fixture(scope="module")
def only_head() -> dict:
    return trained_but(of_body)


@pytest.fixture(scope="module")
def initial() -> dict[str, Tensor]:
    return whole_model().cpu().state_dict()


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_train_like_one_process(ranks, adapted, initial, name, tmp_path):
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [*options, *LORA], str(tmp_path)):
        assert_trained_alike(result, adapted)
        kept = {n: t for n, t in result["state"].items() if "lora" not in n and "bias" not in n}
        assert all(torch.equal(tensor, initial[name]) for name, tensor in kept.items())


@pytest.mark.parametrize(
    "name",
    [
        "one process, recomputed, accumulation",
        "FSDP 2",
        "EP 2, gathered",
        "CP 2",
        "TP 2, FSDP 2, EP 2",
        "PP 2, InterleavedZeroBubble, EP 2",
    ],
)
def test_frozen_parameters_stay_and_the_rest_trains(ranks, frozen, initial, name, tmp_path):
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [*options, *FROZEN], str(tmp_path)):
        assert_trained_alike(result, frozen)
        for name, tensor in result["state"].items():
            assert not of_frozen(name) or torch.equal(tensor, initial[name]), name


@pytest.mark.parametrize("name", ["FSDP 2", "TP 2", "PP 2", "PP 2, InterleavedZeroBubble, EP 2"])
def test_only_the_head_is_trained(ranks, only_head, name, tmp_path):
    """A pipeline's first stage trains nothing then, and has no gradients to send."""
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [*options, *HEAD], str(tmp_path)):
        assert_trained_alike(result, only_head)
