"""The router's kernel is called with the rule's numbers in one order, on any machine."""

import torch

from torchtitan.ops.routing import Rule


def test_the_operator_takes_the_rule_in_its_order():
    arguments = [argument.name for argument in torch.ops.torchtitan.route.default._schema.arguments]
    assert arguments == ["logits_TE", "bias_E", *Rule._fields]
