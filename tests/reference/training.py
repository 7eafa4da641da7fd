"""A training step as one process would write it down: plain model, plain mean, plain AdamW."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def train_plainly(
    model: nn.Module,
    steps: list[tuple[Tensor, Tensor]],
    *,
    lr: float,
    max_norm: float,
    weight_decay: float,
    mask_of: Callable[[Tensor], Tensor | None] = lambda tokens: None,
    side_loss: Callable[[Tensor], Tensor] = lambda mask: mask.new_zeros((), dtype=torch.float32),
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one optimizer step per (tokens, labels); changes the model.

    tokens, labels: the whole global batch (B, S); label −100 = padding. mask_of(tokens): attention
    mask, bool (B, 1, S, S), None = causal. side_loss(mask): of the forward pass
    before, with gradients; mask: bool (B, S), False = padding.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    losses, norms = [], []
    for tokens, labels in steps:
        optimizer.zero_grad()
        logits = model(tokens, attention_masks=mask_of(tokens), token_mask=labels != -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # mean over valid labels
        (loss + side_loss(labels != -100)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        losses.append(loss.item())
        optimizer.step()
        _balance(model)
    return losses, norms


@torch.no_grad()
def _balance(model: nn.Module) -> None:
    for layer in model.layers.values():
        if not layer.moe_enabled:
            continue
        counts = layer.moe.tokens_per_expert.double()
        direction = (counts.mean() - counts).sign()
        layer.moe.expert_bias += 1e-3 * (direction - direction.mean()).float()
        layer.moe.tokens_per_expert.zero_()
