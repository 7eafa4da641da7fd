"""The share of tokens whose experts change when a router's weights are rounded for a file."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.moe.router import TokenChoiceTopKRouter

_TOKENS = 2048  # enough to resolve shares of 0.05 %


# Weight (E, D) of the gate, and bias (E,) or None.
Router = tuple[Tensor, Tensor | None]


@torch.no_grad()
def routing_change(args: DecoderArgs, before: Router, after: Router, norm_D: Tensor) -> float:
    """Share of tokens whose set of top-k experts differs between two versions of a router.

    An estimate without data: the tokens are Gaussian vectors, always the same, under the layer's
    RMSNorm.

    norm_D: weight of the RMSNorm.
    """
    rule = replace(args.moe_args.routing, _debug_force_load_balance=False)
    with torch.device("meta"):
        router = TokenChoiceTopKRouter.of(rule, dim=args.dim)
    x_TD = torch.randn(_TOKENS, args.dim, generator=torch.Generator().manual_seed(0))
    x_TD = nn.functional.rms_norm(x_TD, (args.dim,)).to(norm_D.device) * norm_D.float()
    chosen = []
    for gate, bias in (before, after):
        router.gate.weight = nn.Parameter(gate.float(), requires_grad=False)
        _, ids_TK, _ = router(x_TD, bias)
        chosen.append(ids_TK.sort(dim=-1).values)
    return (chosen[0] != chosen[1]).any(dim=-1).float().mean().item()
