"""What is computed twice under each option, counted by operation."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args

SIZES = {"n_layers": 2, "dim": 32, "n_heads": 2, "inter_dim": 48, "moe_inter_dim": 16}


class Operations(TorchDispatchMode):
    """Counts operations by name, whatever their overload."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations(option: str | None) -> tuple[Counter, list[torch.Tensor]]:
    """Of a forward and backward pass, and the gradients."""
    args = deepseekv3_args["debugmodel"].for_run(overrides=SIZES, seq_len=16)
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    if option is not None:
        settings = ActivationCheckpoint(
            mode="selective",
            selective_ac_option=option,
            per_op_sac_force_recompute_mm_shapes_by_fqns=[],
        )
        apply_activation_checkpoint(model.layers, settings)
    tokens = torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(1))
    with Operations() as seen:
        model(tokens).square().mean().backward()
    return seen.count, [p.grad for p in model.parameters()]


def test_elementwise_recomputes_no_matrix_product():
    plain, grads = operations(None)
    seen, same_grads = operations("elementwise")
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))
    for name in ("mm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu"):
        assert seen[name] == plain[name] > 0, name
    assert seen["silu"] == 2 * plain["silu"] > 0


@pytest.mark.parametrize("option", ["op", "1"])
def test_the_other_options_do(option):
    plain, _ = operations(None)
    assert operations(option)[0]["mm"] > plain["mm"]
