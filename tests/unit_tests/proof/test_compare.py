"""How far tensors may be apart before a proof calls them different."""

import pytest

from torchtitan.proof.compare import tolerance


@pytest.mark.parametrize(
    "key, bf16_state, allowed",
    [
        ((1, "weight", "layers.0.attention.wo.weight"), False, 1e-5),
        ((1, "weight", "layers.0.attention.wo.lora_A"), False, 1e-5),
        ((1, "weight", "layers.0.attention.wo.lora_B"), False, 1e-4),
        ((1, "gradient", "layers.0.moe.experts.w1_lora_B"), False, 1e-5),
        ((2, "gradient", "layers.0.moe.experts.w1_lora_B"), False, 1e-4),
        ((1, "weight", "layers.0.attention.wo.weight"), True, 1e-4),
        ((1, "load", "layers.1.moe"), True, 0),
    ],
)
def test_weights_that_are_updates_alone_may_be_further_apart(key, bf16_state, allowed):
    """Where one process and a layout round differently, B of an adapter differed by 1.4e-5."""
    assert tolerance(key, bf16_state=bf16_state) == pytest.approx(allowed)
