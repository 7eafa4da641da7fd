"""What recomputation saves and costs, and that it sends tokens where they went before."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import ActivationCheckpoint, Compile
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.compile import apply_compile
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args

SIZES = {"n_layers": 5, "n_dense_layers": 1, "dim": 64, "vocab_size": 2048}


def model_with(compile_backend: str | None = None, **settings: Any) -> DeepSeekV3Model:
    args = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=SIZES, seq_len=32)
    torch.manual_seed(1)
    model = DeepSeekV3Model(args)
    model.init_weights()
    apply_activation_checkpoint(model.layers, ActivationCheckpoint(**settings))
    if compile_backend is not None:
        apply_compile(model.layers, Compile(enable=True, backend=compile_backend))
    return model.train()


class _Made(TorchDispatchMode):
    """Remembers the storage of everything that is computed, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self, model: nn.Module) -> int:
        """Bytes still there that aren't the model's own."""
        own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        return sum(n for s, n in self.sizes.items() if not s.expired() and s not in own)


def bytes_and_flops(model: nn.Module) -> tuple[int, int]:
    """Bytes that the forward pass leaves for the backward pass, and the latter's FLOPs."""
    tokens = torch.randint(0, 2048, (2, 32), generator=torch.Generator().manual_seed(2))
    with _Made() as made:
        loss = model(tokens).square().mean()
    held = made.alive(model)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return held, backward.get_total_flops()


BY_OP = {"mode": "selective", "selective_ac_option": "op"}


def test_each_mode_saves_memory_for_as_many_flops_as_it_says() -> None:
    held, flops = zip(
        *(
            bytes_and_flops(model_with(**settings))
            for settings in (
                {"mode": "none"},
                BY_OP,
                {"mode": "selective", "selective_ac_option": "2"},
                {"mode": "full"},
            )
        ),
        strict=True,
    )
    none, by_op, second, full = held
    assert none > by_op > full and none > second > full
    assert full < 0.25 * none
    forward = flops[3] - flops[0]  # what `full` computes again: all layers' forward pass
    assert forward > 0
    # Layers 1 and 3 of 0-4, all of them with experts.
    assert 0.3 * forward < flops[2] - flops[0] < 0.5 * forward
    # Attention, the experts and half of the other products aren't computed again.
    assert 0 < flops[1] - flops[0] < 0.35 * forward


@pytest.mark.parametrize("settings", [{"mode": "full"}, BY_OP], ids=["full", "op"])
def test_recomputation_sends_tokens_where_they_went(settings) -> None:
    """The bias changes between the passes so much that every token would choose others."""
    tokens = torch.randint(0, 2048, (2, 32), generator=torch.Generator().manual_seed(3))

    def gradients(model: DeepSeekV3Model) -> dict[str, Tensor]:
        loss = model(tokens).square().mean()
        for moe in model.moe_layers().values():
            num_experts = moe.expert_bias.numel()
            moe.expert_bias += 100 * torch.arange(num_experts).flip(0) ** 2
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, recomputed = model_with(mode="none"), model_with(**settings)
    expected, got = gradients(plain), gradients(recomputed)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    for moe, twin in zip(
        recomputed.moe_layers().values(), plain.moe_layers().values(), strict=True
    ):
        assert torch.equal(moe.tokens_per_expert, twin.tokens_per_expert)


def test_with_a_memory_budget_the_compiler_keeps_less() -> None:
    held = []
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        model = model_with("aot_eager_decomp_partition", mode="memory_budget", memory_budget=budget)
        held.append(_bytes_packed(model))
    model_with(mode="none")  # the setting is the process's
    torch._dynamo.reset()
    assert held[1] < 0.7 * held[0]


def _bytes_packed(model: DeepSeekV3Model) -> int:
    layer, x = model.layers["0"], torch.randn(2, 32, 64, requires_grad=True)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = layer(x, model.rope)
    out.sum().backward()
    return sum(kept.values())


def test_equal_layers_share_what_is_compiled() -> None:
    """With recomputation, too: 1 dense layer and 4 with experts are two graphs' worth of code."""
    tokens = torch.randint(0, 2048, (2, 32))
    counts = []
    for settings in ({"mode": "none"}, {"mode": "full"}):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        model = model_with(**settings)
        for layer in model.layers.values():
            assert layer.forward.__func__ is model.layers["0"].forward.__func__
        apply_compile(model.layers, Compile(enable=True, backend=counter))
        model(tokens)
        first = counter.frame_count
        model(tokens.flip(0))
        assert counter.frame_count == first
        counts.append(first)
    torch._dynamo.reset()
    assert max(counts) <= 8


class _Counted(TorchDispatchMode):
    """Operations by name, whatever their overload."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def operations(**settings: Any) -> Counter[str]:
    """Count the operations of a forward and backward pass."""
    tokens = torch.randint(0, 2048, (2, 32), generator=torch.Generator().manual_seed(2))
    settings |= {"per_op_sac_force_recompute_mm_shapes_by_fqns": []}
    model = model_with(**settings)
    with _Counted() as seen:
        model(tokens).square().mean().backward()
    return seen.count


def test_elementwise_recomputes_no_matrix_product() -> None:
    plain = operations(mode="none")
    seen = operations(mode="selective", selective_ac_option="elementwise")
    for name in ("mm", "_grouped_mm", "causal_blocks"):
        assert seen[name] == plain[name] > 0, name
    assert seen["silu"] == 2 * plain["silu"] > 0
    assert operations(**BY_OP)["mm"] > plain["mm"]
