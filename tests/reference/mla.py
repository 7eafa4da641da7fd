"""Slow twin of multi-head latent attention: one head and one S × S softmax at a time.

Written from the DeepSeek-V2 report (arXiv 2405.04434, section 2.1 and appendix C), with rotary
embedding as multiplication by unit complex numbers.
"""

import math

import torch
from torch import Tensor


def rotate(x_SC: Tensor, angles: Tensor) -> Tensor:
    """Neighbouring channels as one complex number, turned by angles (S, C / 2)."""
    turned = torch.view_as_complex(x_SC.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def frequencies(dim: int, theta: float, yarn: dict | None = None) -> list[float]:
    """Radians per position of each pair. yarn: factor, original, beta_fast, beta_slow."""
    out = []
    for pair in range(dim // 2):
        plain = theta ** (-2 * pair / dim)
        if yarn is None:
            out.append(plain)
            continue

        # YaRN keeps pairs that turn often in the original context and stretches those that don't;
        # DeepSeek's code takes the ramp between them over whole pair numbers.
        def pair_turning(rotations: float) -> float:
            # original · theta^(−2i/dim) = 2π · rotations, solved for i
            return dim / 2 * math.log(yarn["original"] / (2 * math.pi * rotations), theta)  # noqa: B023

        low = max(math.floor(pair_turning(yarn["beta_fast"])), 0)
        high = min(math.ceil(pair_turning(yarn["beta_slow"])), dim - 1)
        stretch = min(max((pair - low) / (high - low), 0.0), 1.0)
        out.append((1 - stretch) * plain + stretch * plain / yarn["factor"])
    return out


def attend(q_SC: Tensor, k_SC: Tensor, v_SC: Tensor, scale: float, may_see_SS: Tensor) -> Tensor:
    scores_SS = (scale * q_SC @ k_SC.T).masked_fill(~may_see_SS, -math.inf)
    exps_SS = (scores_SS - scores_SS.amax(dim=1, keepdim=True)).exp()
    return exps_SS / exps_SS.sum(dim=1, keepdim=True) @ v_SC


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def mla(
    x_SD: Tensor,
    state: dict[str, Tensor],
    *,
    n_heads: int,
    nope: int,
    v_channels: int,
    freqs: list[float],
    scale: float,
    may_see_SS: Tensor | None = None,
) -> Tensor:
    """One sequence through the layer; state: weights by their names in `Attention`."""
    S = x_SD.size(0)
    if may_see_SS is None:
        may_see_SS = torch.ones(S, S, dtype=torch.bool).tril()
    positions = torch.arange(S, dtype=x_SD.dtype)
    angles = torch.outer(positions, torch.tensor(freqs, dtype=x_SD.dtype))
    weight = {name.removesuffix(".weight"): tensor for name, tensor in state.items()}

    if "wq" in weight:
        q = x_SD @ weight["wq"].T
    else:
        q = rms_norm(x_SD @ weight["wq_a"].T, weight["q_norm"]) @ weight["wq_b"].T
    down = x_SD @ weight["wkv_a"].T
    latent_rank = weight["kv_norm"].numel()
    kv = rms_norm(down[:, :latent_rank], weight["kv_norm"]) @ weight["wkv_b"].T
    k_rope = rotate(down[:, latent_rank:], angles)  # one for all heads

    heads = []
    for q_SC, kv_SC in zip(q.chunk(n_heads, dim=1), kv.chunk(n_heads, dim=1), strict=True):
        q_SC = torch.cat((q_SC[:, :nope], rotate(q_SC[:, nope:], angles)), dim=1)
        k_SC = torch.cat((kv_SC[:, :nope], k_rope), dim=1)
        assert kv_SC.size(1) == nope + v_channels, "wkv_b has other channels than the test says"
        heads.append(attend(q_SC, k_SC, kv_SC[:, nope:], scale, may_see_SS))
    return torch.cat(heads, dim=1) @ weight["wo"].T
