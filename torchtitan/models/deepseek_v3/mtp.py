"""Multi-token prediction: extra layers that predict the tokens after the next one, for training.

DeepSeek-V3 report (arXiv 2412.19437), section 2.2. Layer k of K takes the output of the previous
layer (of the model itself for k = 1) and the token that this one predicts, and predicts one token
further:

    x_i = eh_proj([enorm(embedding(token i + k)); hnorm(h_i)])      label: token i + k + 1
    h_i = norm(block(x)_i), which is also the input of the next layer

Embedding and head are the model's. The order in `eh_proj`, and the use of h after the norm, are
those of the published weights. The loss is lambda / K · the sum over layers, divided by the step's
valid tokens as the main loss is, and joins the backward pass at the logits (`attach_loss`).

The same labels count as in the main loss, with the same weights, except the last k of a sequence,
which are beyond its end. Where documents are kept apart (attn_mask_type "block_causal"), token
i + k must also belong to the document of token i, so that nothing is predicted from another
document's tokens; the label may be the first token of the next document, as in the main loss.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.decoder import TransformerBlock
from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.moe.aux_loss import attach_loss
from torchtitan.models.moe.balancing import record_load
from torchtitan.models.moe.load import RoutingLoad
from torchtitan.ops.attention import AttentionMask
from torchtitan.ops.buffers import KeepsBufferDtypes
from torchtitan.ops.cross_entropy import IGNORE_INDEX, cross_entropy_sum
from torchtitan.ops.linear import Linear


class MTPInputs(NamedTuple):
    """Inputs of multi-token prediction.

    tokens_BKS: int64, token i + k, which layer k embeds at position i.
    labels_BKS: int64, the label of layer k at position i, or −100.
    counted_BKS: bool, whether token i + k is there and of the document of token i; other positions
        are left out of the load of layer k's experts.
    weights_BKS: one tensor, fp32, of the labels; none = 1. (Pipelines of torch 2.11 ask every
        argument of a stage for its gradient, which a None doesn't bear.)
    """

    tokens_BKS: Tensor
    labels_BKS: Tensor
    counted_BKS: Tensor
    weights_BKS: tuple[Tensor, ...] = ()

    def at(self, positions_Q: Tensor) -> "MTPInputs":
        """Keep these positions."""
        tokens, labels, counted, weights = self
        return MTPInputs(
            tokens[..., positions_Q],
            labels[..., positions_Q],
            counted[..., positions_Q],
            tuple(each[..., positions_Q] for each in weights),
        )


def mtp_inputs(
    tokens_BS: Tensor,
    labels_BS: Tensor,
    documents_BS: Tensor,
    num_layers: int,
    *,
    apart: bool,
    weights_BS: Tensor | None = None,
) -> MTPInputs:
    """Make the inputs from whole sequences, before context parallelism splits them.

    tokens_BS, labels_BS: int64.
    documents_BS: int64, the document of each token; −1 = padding.
    apart: whether nothing is predicted from tokens of another document.
    weights_BS: fp32, of the labels; None = 1.
    """
    following_BS = torch.where(labels_BS == IGNORE_INDEX, 0, labels_BS)
    following_BS[:, :-1] = tokens_BS[:, 1:]
    tokens, labels, counted = [], [], []
    for k in range(1, num_layers + 1):
        further_BS = _further(documents_BS, k, -1)
        counted_BS = further_BS == documents_BS if apart else further_BS >= 0
        counted_BS = counted_BS & (further_BS >= 0)
        tokens.append(_further(following_BS, k - 1, 0))
        labels.append(_further(labels_BS, k, IGNORE_INDEX).where(counted_BS, IGNORE_INDEX))
        counted.append(counted_BS)
    weights_BKS: tuple[Tensor, ...] = ()
    if weights_BS is not None:
        further = [_further(weights_BS, k, 0) for k in range(1, num_layers + 1)]
        weights_BKS = (torch.stack(further, dim=1),)
    tokens_BKS, labels_BKS, counted_BKS = (
        torch.stack(each, dim=1) for each in (tokens, labels, counted)
    )
    return MTPInputs(tokens_BKS, labels_BKS, counted_BKS, weights_BKS)


def _further(x_BS: Tensor, by: int, fill: int) -> Tensor:
    """Shift x: the result at i is x at i + by, and `fill` beyond the end."""
    return F.pad(x_BS[:, by:], (0, by), value=fill)


class MTPLayer(nn.Module):
    """One layer of multi-token prediction.

    block: a block of the model with experts.
    """

    def __init__(self, args: DeepSeekV3ModelArgs, block: TransformerBlock):
        super().__init__()
        self.enorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.hnorm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.eh_proj = Linear(2 * args.dim, args.dim)
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
    ) -> tuple[Tensor, RoutingLoad]:
        """Return the new h (B, S, D), which the head takes, and the load of the block's experts."""
        x_BSD = self.eh_proj(torch.cat((self.enorm(embedded_BSD), self.hnorm(h_BSD)), dim=-1))
        x_BSD, load = self.block(x_BSD, rope, mask, positions_BS, token_mask_BS)
        return self.norm(x_BSD), load


class MTPLayers(KeepsBufferDtypes, nn.ModuleDict):
    """All layers, by number from "0" on, and their losses.

    loss_weight: lambda.
    loss_fn: sum of the losses of logits (B, S, V) and labels (B, S), and of weights (B, S) where
        labels have some; replaced where the logits are split over ranks.

    Buffers, at least fp32:
    labels_in_step: (), divisor of the losses: labels, or the sum of their weights.
    loss_sums: (K,), sums of the step's losses, without lambda and the divisor.
    """

    labels_in_step: Tensor
    loss_sums: Tensor

    def __init__(self, args: DeepSeekV3ModelArgs, blocks: Sequence[TransformerBlock]):
        super().__init__({str(k): MTPLayer(args, block) for k, block in enumerate(blocks)})
        self.loss_weight = args.mtp_loss_weight
        self.loss_fn: Callable[..., Tensor] = cross_entropy_sum
        for name, value in (
            ("labels_in_step", torch.ones(())),
            ("loss_sums", torch.zeros(len(blocks))),
        ):
            self.register_buffer(name, value.float(), persistent=False)

    def numbered(self) -> list[tuple[str, MTPLayer]]:
        """List the layers with their numbers."""
        return cast(list[tuple[str, MTPLayer]], list(self.items()))

    def init_buffers(self) -> None:
        self.labels_in_step.fill_(1)
        self.loss_sums.zero_()

    def forward(
        self,
        h_BSD: Tensor,
        embedded: Sequence[Tensor],
        counted_BKS: Tensor,
        rope: Tensor,
        mask: AttentionMask,
        positions_BS: Tensor | None,
    ) -> list[Tensor]:
        """Run all layers; return the input of the head of each, (B, S, D).

        h_BSD: the model's own input of the head.
        embedded: embeddings (B, S, D) of each layer's tokens.
        counted_BKS: from `MTPInputs`.
        """
        hidden = []
        for (_, layer), x_BSD, counted_BS in zip(
            self.numbered(), embedded, counted_BKS.unbind(1), strict=True
        ):
            h_BSD, load = layer(h_BSD, x_BSD, rope, mask, positions_BS, counted_BS)
            record_load(layer.block.moe, load)
            hidden.append(h_BSD)
        return hidden

    def attach_losses(
        self, logits: Tensor, predicted: Sequence[Tensor], inputs: MTPInputs
    ) -> Tensor:
        """Return the model's `logits` with the layers' losses attached to their backward pass.

        predicted: logits of each layer, (B, S, V) or a rank's part of it.
        """
        columns = [inputs.labels_BKS.unbind(1)]
        columns += [weights.unbind(1) for weights in inputs.weights_BKS]
        losses = torch.stack(
            [self.loss_fn(*each) for each in zip(predicted, *columns, strict=True)]
        )
        self.loss_sums += losses.detach()
        weight = self.loss_weight / len(self)
        return attach_loss(logits, weight * losses.sum() / self.labels_in_step)

    def take_losses(self) -> Tensor:
        """Return `loss_sums` and reset them to zero."""
        sums = self.loss_sums.clone()
        self.loss_sums.zero_()
        return sums
