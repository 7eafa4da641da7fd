"""The DeepSeek-V2/V3 model: multi-head latent attention, dense first layers, MoE layers.

Reports: arXiv 2405.04434 (V2, section 2.1: MLA) and 2412.19437 (V3). Single-device code: where
tensors live is decided in parallelize.py.

Letters: B batch, S sequence, D model dim, H heads, C channels.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.latent_cache import latent_caches
from torchtitan.models.deepseek_v3.mtp import MTPInputs, MTPLayer, mtp_inputs, mtp_losses
from torchtitan.models.moe import FeedForward, MoE
from torchtitan.models.moe.aux_loss import attach_loss
from torchtitan.models.moe.balancing import Load, record_load
from torchtitan.ops.attention import AttentionMask, attention, causal_mask, document_mask
from torchtitan.ops.init import init_parameters
from torchtitan.ops.linear_cross_entropy import linear_cross_entropy
from torchtitan.ops.mla_attention import can_fuse, mla_attention
from torchtitan.ops.rope import apply_rope, rope_table
from torchtitan.protocols.model import BaseModel


class Attention(nn.Module):
    """Multi-head latent attention (MLA).

    Keys and values come from one normalised latent of `kv_lora_rank` channels; queries from another
    (or directly). Position sits in `qk_rope_head_dim` extra channels, for keys shared by all heads.

    w_in: the weights that take the layer's input, as one (components/working_weights.py).
    """

    w_in: Tensor | None = None

    def __init__(self, args: DeepSeekV3ModelArgs):
        super().__init__()
        self.n_heads = args.n_heads
        self.kv_lora_rank = args.kv_lora_rank
        self.qk_nope_head_dim = args.qk_nope_head_dim
        self.qk_rope_head_dim = args.qk_rope_head_dim
        self.v_head_dim = args.v_head_dim
        self.softmax_scale = args.softmax_scale

        q_out = args.n_heads * args.qk_head_dim
        self.compress_q = args.q_lora_rank > 0
        first_of_q = "wq_a.weight" if self.compress_q else "wq.weight"
        self.fused_weights = {"w_in": ((first_of_q, "wkv_a.weight"), 0)}
        if self.compress_q:
            self.wq_a = nn.Linear(args.dim, args.q_lora_rank, bias=False)
            self.q_norm = nn.RMSNorm(args.q_lora_rank, eps=args.norm_eps)
            self.wq_b = nn.Linear(args.q_lora_rank, q_out, bias=False)
        else:
            self.wq = nn.Linear(args.dim, q_out, bias=False)
        self.wkv_a = nn.Linear(args.dim, args.kv_lora_rank + args.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(args.kv_lora_rank, eps=args.norm_eps)
        kv_out = args.n_heads * (args.qk_nope_head_dim + args.v_head_dim)
        self.wkv_b = nn.Linear(args.kv_lora_rank, kv_out, bias=False)
        self.wo = nn.Linear(args.n_heads * args.v_head_dim, args.dim, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """rope: table of `rope_table`. mask, positions_BS: see `DeepSeekV3Model.forward`."""
        q, kv = self._project(x_BSD)
        q = self.wq_b(self.q_norm(q)) if self.compress_q else q
        q_BSHC = q.unflatten(-1, (self.n_heads, -1))
        latent, k_rope = kv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_norm(latent)
        if self._can_fuse(q_BSHC, mask):
            out_BSHC = mla_attention(
                q_BSHC,
                self.wkv_b(latent).unflatten(-1, (self.n_heads, -1)),
                k_rope,
                rope,
                v_channels=self.v_head_dim,
                scale=self.softmax_scale,
                mask=mask,
                positions_BS=positions_BS,
            )
            return self.wo(out_BSHC.flatten(-2))

        q_nope, q_rope = q_BSHC.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q_BSHC = torch.cat((q_nope, apply_rope(q_rope, rope, positions_BS)), dim=-1)
        k_rope = apply_rope(k_rope.unsqueeze(2), rope, positions_BS)
        out_BSHC = self.attend(q_BSHC, latent, k_rope, mask)
        return self.wo(out_BSHC.flatten(-2))

    def attend(
        self, q_BSHC: Tensor, latent_BSC: Tensor, k_rope_BS1C: Tensor, mask: AttentionMask
    ) -> Tensor:
        """Attention on keys and values still compressed (context parallelism and latent_cache.py
        step in here).
        """
        k_BSHC, v_BSHC = self.expand(latent_BSC, k_rope_BS1C)
        return attention(q_BSHC, k_BSHC, v_BSHC, scale=self.softmax_scale, mask=mask)

    def expand(self, latent_BSC: Tensor, k_rope_BS1C: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head."""
        kv_BSHC = self.wkv_b(latent_BSC).unflatten(-1, (self.n_heads, -1))
        k_nope, v_BSHC = kv_BSHC.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_BSHC = torch.cat((k_nope, k_rope_BS1C.expand(-1, -1, self.n_heads, -1)), dim=-1)
        return k_BSHC, v_BSHC

    def _can_fuse(self, q_BSHC: Tensor, mask: AttentionMask) -> bool:
        """Whether one operator does for the lines between the projections: on the GPU of a single
        process (parallel layouts take the lines apart).
        """
        return (
            self.w_in is not None
            and not isinstance(mask, Tensor)
            and can_fuse(
                q_BSHC.device.type,
                q_BSHC.dtype,
                self.qk_nope_head_dim,
                self.qk_rope_head_dim,
                self.v_head_dim,
            )
        )

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (or their latent); keys' and values' latent with the shared rotary channels."""
        if self.w_in is not None:
            kv_channels = self.kv_lora_rank + self.qk_rope_head_dim
            both = F.linear(x_BSD, self.w_in)
            return both.split([self.w_in.size(0) - kv_channels, kv_channels], dim=-1)
        return (self.wq_a if self.compress_q else self.wq)(x_BSD), self.wkv_a(x_BSD)


class TransformerBlock(nn.Module):
    """Attention, then a dense feed-forward (first layers) or experts, on normalised inputs."""

    def __init__(self, layer_id: int, args: DeepSeekV3ModelArgs):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.moe_enabled = layer_id >= args.n_dense_layers
        if self.moe_enabled:
            self.moe = MoE(args.moe_args, dim=args.dim, hidden_dim=args.moe_inter_dim)
        else:
            self.feed_forward = FeedForward(args.dim, args.inter_dim)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask = None,
        positions_BS: Tensor | None = None,
        token_mask_BS: Tensor | None = None,
    ) -> tuple[Tensor, Load | None]:
        """Returns the new hidden state and, with experts, this batch's load.

        The load is returned, not kept: a block may be recomputed in the backward pass, and only
        what leaves it is sure to happen once.
        """
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, mask, positions_BS)
        normed = self.ffn_norm(x_BSD)
        if not self.moe_enabled:
            return x_BSD + self.feed_forward(normed), None
        out, load = self.moe(normed, token_mask_BS, return_load=True)
        return x_BSD + out, load


class Output(nn.Linear):
    """Hidden states to logits, or with labels straight to the loss, without holding the logits."""

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Logits (..., V), or with labels the scalar of `linear_cross_entropy`."""
        if labels_BS is None:
            return super().forward(x_BSD)
        return linear_cross_entropy(x_BSD.flatten(0, -2), self.weight, labels_BS.flatten())


class DeepSeekV3Model(BaseModel):
    """Tokens to logits, or to the loss."""

    computes_loss = True

    def __init__(self, model_args: DeepSeekV3ModelArgs):
        super().__init__()
        self.model_args = model_args
        self.tok_embeddings = nn.Embedding(model_args.vocab_size, model_args.dim)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(i, model_args) for i in range(model_args.n_layers)}
        )
        self.mtp = nn.ModuleDict(
            {
                str(k): MTPLayer(model_args, TransformerBlock(model_args.n_layers + k, model_args))
                for k in range(model_args.n_mtp_layers)
            }
        )
        self.mtp_loss_weight = model_args.mtp_loss_weight
        self.norm = nn.RMSNorm(model_args.dim, eps=model_args.norm_eps)
        self.output = Output(model_args.dim, model_args.vocab_size, bias=False)
        self.register_buffer("rope", self._make_rope_table(), persistent=False)
        for name, value in (
            ("tokens_in_step", torch.ones(())),
            ("mtp_loss", torch.zeros(model_args.n_mtp_layers)),
        ):
            self.register_buffer(name, value.float(), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        attention_masks: AttentionMask = None,
        positions: Tensor | None = None,
        token_mask: Tensor | None = None,
        mtp: MTPInputs | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, V) of int64 tokens (B, S); with int64 labels (B, S) the sum of their losses
        instead (scalar, see `linear_cross_entropy`).

        attention_masks: from `get_attention_masks`, None = causal. positions: (B, S) int64, None =
        0, 1, …. token_mask: (B, S) bool, False = padding, left out of the expert load. mtp: from
        `extra_inputs`, in training; its loss then joins the backward pass of the logits.

        A pipeline's part without `tok_embeddings` takes the hidden states (B, S, D) of the one
        before as `tokens`; one without `output` returns its own.
        """
        x_BSD, *embedded = self._embed(tokens, mtp)
        for layer in self.layers.values():
            x_BSD, load = layer(x_BSD, self.rope, attention_masks, positions, token_mask)
            if load is not None and self.training and torch.is_grad_enabled():
                record_load(layer.moe, load)
        if self.output is None:
            return x_BSD
        h_BSD = self.norm(x_BSD)
        if mtp is None:
            return self.output(h_BSD, labels)
        return self._predict_further(h_BSD, embedded, mtp, attention_masks, positions)

    def _embed(self, tokens: Tensor, mtp: MTPInputs | None) -> list[Tensor]:
        """Embedding and head are called once each: FSDP gathers their weights for one call."""
        if self.tok_embeddings is None:
            return [tokens]
        if mtp is None:
            return [self.tok_embeddings(tokens)]
        return list(self.tok_embeddings(torch.stack((tokens, *mtp.tokens_KBS))))

    def _predict_further(
        self,
        h_BSD: Tensor,
        embedded: list[Tensor],
        mtp: MTPInputs,
        mask: AttentionMask,
        positions: Tensor | None,
    ) -> Tensor:
        """The logits of the main model; see mtp.py for the rest."""
        hidden = [h_BSD]
        for layer, x_BSD, labels in zip(self.mtp.values(), embedded, mtp.labels_KBS, strict=True):
            counted = labels != -100
            h_BSD, load = layer(hidden[-1], x_BSD, self.rope, mask, positions, counted)
            record_load(layer.block.moe, load)
            hidden.append(h_BSD)
        every = self.output(torch.stack(hidden))
        losses = mtp_losses(every[1:], mtp.labels_KBS)
        self.mtp_loss += losses.detach()
        weight = self.mtp_loss_weight / len(self.mtp)
        return attach_loss(every[0], weight * losses.sum() / self.tokens_in_step)

    def extra_inputs(
        self, tokens_BS: Tensor, labels_BS: Tensor, eos_id: int | None
    ) -> dict[str, Any]:
        if not self.mtp or not self.training:
            return {}
        apart = self.model_args.attn_mask_type == "block_causal"
        return {"mtp": mtp_inputs(tokens_BS, labels_BS, len(self.mtp), eos_id if apart else None)}

    def blocks(self) -> dict[str, nn.Module]:
        return {**dict(self.layers.items()), **{f"mtp.{k}": each for k, each in self.mtp.items()}}

    def take_side_losses(self) -> dict[str, Tensor]:
        sums = {f"mtp_loss_{k + 1}": each for k, each in enumerate(self.mtp_loss.clone())}
        self.mtp_loss.zero_()
        return sums

    def get_attention_masks(
        self,
        tokens_BS: Tensor,
        eos_id: int | None,
        queries_Q: Tensor | None = None,
        device: torch.device | None = None,
    ) -> AttentionMask:
        if self.model_args.attn_mask_type == "causal":
            return None if queries_Q is None else causal_mask(queries_Q)
        self.model_args.check_tokenizer(eos_id)
        return document_mask(tokens_BS, eos_id, queries_Q, device)

    def caching(self, batch_size: int, length: int) -> AbstractContextManager[None]:
        return latent_caches(
            [layer.attention for layer in self.layers.values()], batch_size, length
        )

    def moe_layers(self) -> dict[int, nn.Module]:
        moes = {int(i): layer.moe for i, layer in self.layers.items() if layer.moe_enabled}
        first = self.model_args.n_layers
        return moes | {first + int(k): layer.block.moe for k, layer in self.mtp.items()}

    def set_tokens_in_step(self, tokens: Tensor) -> None:
        self.tokens_in_step.copy_(tokens)
        for moe in self.moe_layers().values():
            moe.tokens_in_step.copy_(tokens)

    def set_coefficients(self, values: Mapping[str, float]) -> None:
        self.mtp_loss_weight = values.get("mtp_loss_weight", self.mtp_loss_weight)
        for moe in self.moe_layers().values():
            moe.set_coefficients(values)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Matrices normal with `init_std`, norms one, expert bias zero.

        buffer_device: where the rotary table goes; absent = where the model is.
        """
        init_parameters(self, self.model_args.init_std)
        for moe in self.moe_layers().values():
            moe.init_buffers()
        self.tokens_in_step.fill_(1)
        self.mtp_loss.zero_()
        self.rope = self._make_rope_table().to(buffer_device or self.rope.device)

    def _apply(self, fn, recurse: bool = True):
        # `model.bfloat16()` and friends must not round the rotary table: its cosines would be off
        # by up to 2e-3, and neighbouring positions of the slow pairs would become one. Nor what is
        # counted.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self

    def _make_rope_table(self) -> Tensor:
        args = self.model_args
        return rope_table(
            args.qk_rope_head_dim, args.max_seq_len, args.rope_theta, args.yarn_scaling
        )
