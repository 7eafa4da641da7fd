"""Multi-token prediction: extra layers that predict the tokens after the next one, for training.

DeepSeek-V3 report (arXiv 2412.19437), section 2.2. Layer k of K takes what the one before made
(the model itself for k = 1) and the token that it predicted, and predicts one token further:

    x_i = eh_proj([enorm(embedding(token i + k)); hnorm(h_i)])      label: token i + k + 1
    h_i = norm(block(x)_i), which is also what the next layer takes

Embedding and head are the model's. The order in `eh_proj`, and that h is taken after the norm, are
those of the published weights. The loss is lambda / K · the sum over layers, divided by the step's
valid tokens as the main loss is, and joins the backward pass at the logits (`attach_loss`).

Which labels count: those that count in the main loss, but for the last k of a sequence, which lie
beyond it. Where documents are kept apart (attn_mask_type "block_causal"), token i + k must also
belong to the document of token i, so that nothing is predicted from another document's tokens; that
the label is the first token of the next document is allowed, as it is in the main loss.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.moe.balancing import Load
from torchtitan.ops.attention import AttentionMask

_IGNORE = -100  # F.cross_entropy's; torchtitan.components.loss has it as IGNORE_INDEX


class MTPInputs(NamedTuple):
    """tokens_KBS: int64, what layer k embeds beside position i: token i + k. labels_KBS: int64,
    what it predicts, or −100."""

    tokens_KBS: Tensor
    labels_KBS: Tensor


def mtp_inputs(
    tokens_BS: Tensor, labels_BS: Tensor, num_layers: int, eos_id: int | None
) -> MTPInputs:
    """From whole sequences, before they may be split. eos_id: where documents are kept apart."""
    following_BS = torch.where(labels_BS == _IGNORE, 0, labels_BS)
    following_BS[:, :-1] = tokens_BS[:, 1:]
    ends_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    if eos_id is not None:
        ends_BS = tokens_BS == eos_id
    crossed_BS = torch.zeros_like(ends_BS)  # a document ended between token i and token i + k
    tokens, labels = [], []
    for k in range(1, num_layers + 1):
        crossed_BS = crossed_BS | _further(ends_BS, k - 1, True)
        tokens.append(_further(following_BS, k - 1, 0))
        labels.append(_further(labels_BS, k, _IGNORE).masked_fill(crossed_BS, _IGNORE))
    return MTPInputs(torch.stack(tokens), torch.stack(labels))


def _further(x_BS: Tensor, by: int, fill: int) -> Tensor:
    """x at i + by."""
    return F.pad(x_BS[:, by:], (0, by), value=fill)


class MTPLayer(nn.Module):
    """One layer; `block` is a block of the model with experts."""

    def __init__(self, args: DeepSeekV3ModelArgs, block: nn.Module):
        super().__init__()
        self.enorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.hnorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.eh_proj = nn.Linear(2 * args.dim, args.dim, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self,
        h_BSD: Tensor,
        embedded_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask,
        positions_BS: Tensor | None,
        token_mask_BS: Tensor,
    ) -> tuple[Tensor, Load]:
        """The new h, ready for the head, and the load of the block's experts."""
        x_BSD = self.eh_proj(torch.cat((self.enorm(embedded_BSD), self.hnorm(h_BSD)), dim=-1))
        x_BSD, load = self.block(x_BSD, rope, mask, positions_BS, token_mask_BS)
        return self.norm(x_BSD), load


def mtp_losses(logits_KBSV: Tensor, labels_KBS: Tensor) -> Tensor:
    """Summed cross entropy of each layer: (K,), at least fp32."""
    dtype = torch.promote_types(logits_KBSV.dtype, torch.float32)
    return torch.stack(
        [
            F.cross_entropy(logits.flatten(0, 1).to(dtype), labels.flatten(), reduction="sum")
            for logits, labels in zip(logits_KBSV, labels_KBS, strict=True)
        ]
    )
