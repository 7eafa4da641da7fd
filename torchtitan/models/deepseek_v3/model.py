"""The DeepSeek-V2/V3 model: multi-head latent attention, dense first layers, MoE layers.

Reports: arXiv 2405.04434 (V2, section 2.1: MLA) and 2412.19437 (V3). The parts that it shares with
other families are in models/decoder/model.py. Single-device code: parallelize.py decides where
tensors live.

Letters: B batch, S sequence, D model dim, H heads, C channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan.models.decoder import Decoder, SelfAttention, TransformerBlock
from torchtitan.models.decoder.attention import Narrow
from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.latent_cache import LatentAttend
from torchtitan.models.deepseek_v3.mtp import MTPInputs, MTPLayer, MTPLayers, mtp_inputs
from torchtitan.models.moe import MoE
from torchtitan.ops.attention import AttentionMask, Documents
from torchtitan.ops.linear import Joint, Linear, linear_joint
from torchtitan.ops.mla_attention import can_fuse, mla_attention
from torchtitan.ops.rope import apply_rope, rope_table


class Attention(SelfAttention):
    """Multi-head latent attention (MLA).

    Keys and values come from one normalised latent of `kv_lora_rank` channels; queries from another
    (or directly). Position sits in `qk_rope_head_dim` extra channels, for keys shared by all heads.
    """

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
        if self.compress_q:
            self.wq_a = Linear(args.dim, args.q_lora_rank)
            self.q_norm = nn.RMSNorm(args.q_lora_rank, eps=args.norm_eps)
            self.wq_b = Linear(args.q_lora_rank, q_out)
        else:
            self.wq = Linear(args.dim, q_out)
        first_of_q = "wq_a" if self.compress_q else "wq"
        self.w_in = Joint(f"{first_of_q}.weight", "wkv_a.weight", dim=0)
        self.wkv_a = Linear(args.dim, args.kv_lora_rank + args.qk_rope_head_dim)
        self.kv_norm = nn.RMSNorm(args.kv_lora_rank, eps=args.norm_eps)
        kv_out = args.n_heads * (args.qk_nope_head_dim + args.v_head_dim)
        self.wkv_b = Linear(args.kv_lora_rank, kv_out)
        self.wo = Linear(args.n_heads * args.v_head_dim, args.dim)

    def forward(
        self,
        x_BSD: Tensor,
        rope: Tensor,
        mask: AttentionMask = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend: (B, S, D).

        rope: table from `rope_table`.
        mask, positions_BS: see `Decoder.forward`.
        """
        first_of_q = self.wq_a if self.compress_q else self.wq
        q, kv = linear_joint(x_BSD, self.w_in, (first_of_q, self.wkv_a))
        q = self.wq_b(self.q_norm(q)) if self.compress_q else q
        q_BSHC = q.unflatten(-1, (self.n_heads, -1))
        latent, k_rope = kv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_norm(latent)
        if (mask is None or isinstance(mask, Documents)) and self._can_fuse(q_BSHC):
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
        out_BSHC = self.attend(q_BSHC, (latent, k_rope), mask)
        return self.wo(out_BSHC.flatten(-2))

    def expand(self, narrow: Narrow) -> tuple[Tensor, Tensor]:
        """Compute keys and values of every head, (B, S, H, C).

        narrow: the latent (B, S, C), and the rotary key (B, S, 1, C) that all heads share.
        """
        latent_BSC, k_rope_BS1C = narrow
        kv_BSHC = self.wkv_b(latent_BSC).unflatten(-1, (self.n_heads, -1))
        k_nope, v_BSHC = kv_BSHC.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        k_BSHC = torch.cat((k_nope, k_rope_BS1C.expand(-1, -1, self.n_heads, -1)), dim=-1)
        return k_BSHC, v_BSHC

    def _can_fuse(self, q_BSHC: Tensor) -> bool:
        """Tell whether the fused MLA operator applies: on a GPU, where this rank has all keys and
        values and no cache is in use."""
        return self.attend_with is None and can_fuse(
            q_BSHC.device.type,
            q_BSHC.dtype,
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.v_head_dim,
        )


class DeepSeekV3Model(Decoder):
    """Tokens to logits, or to the loss; with multi-token prediction (mtp.py) in training."""

    model_args: DeepSeekV3ModelArgs
    cached_attend = LatentAttend

    def __init__(self, model_args: DeepSeekV3ModelArgs):
        super().__init__(model_args)
        first, depth = model_args.n_layers, model_args.n_mtp_layers
        further = [self.make_block(first + k) for k in range(depth)]
        # None without multi-token prediction, and where it is on another pipeline stage.
        self.mtp = MTPLayers(model_args, further) if further else None

    def make_block(self, layer_id: int) -> TransformerBlock:
        args = self.model_args
        is_dense = layer_id < args.n_dense_layers
        return TransformerBlock(args, Attention(args), args.inter_dim if is_dense else None)

    def make_rope_table(self) -> Tensor:
        args = self.model_args
        return rope_table(
            args.qk_rope_head_dim,
            args.max_seq_len,
            args.rope_theta,
            args.yarn_scaling,
            truncate=args.yarn_truncate,
            factor=args.attention_factor if args.use_yarn else 1.0,
        )

    def set_context(self, model_args: DeepSeekV3ModelArgs) -> None:
        super().set_context(model_args)
        for module in self.modules():
            if isinstance(module, Attention):
                module.softmax_scale = model_args.softmax_scale

    def forward(
        self,
        tokens: Tensor,
        attention_masks: AttentionMask = None,
        positions: Tensor | None = None,
        token_mask: Tensor | None = None,
        labels: Tensor | None = None,
        mtp: MTPInputs | None = None,
    ) -> Tensor:
        """Compute logits or the loss, as `Decoder.forward`.

        With K layers of multi-token prediction, the parts of a pipeline exchange tensors
        (B, S, (K + 1) D): the hidden state and the embeddings of the following tokens, for the last
        part. A copy of the embedding table in the last part would take more memory, and its
        gradient would be a sum over two stages.

        mtp: from `extra_inputs`, in training; its loss joins the backward pass of the logits.
        """
        x_BSD, *further = self._embed(tokens, mtp)
        x_BSD = self.run_layers(x_BSD, attention_masks, positions, token_mask)
        if self.output is None or self.norm is None:
            return torch.cat((x_BSD, *further), dim=-1) if further else x_BSD
        h_BSD = self.norm(x_BSD)
        if mtp is None or self.mtp is None:
            return self.output(h_BSD, labels)
        hidden = self.mtp(h_BSD, further, mtp.counted_BKS, self.rope, attention_masks, positions)
        # One call for all, as in `_embed`, because FSDP gathers the weights for each call.
        logits, *predicted = self.output(torch.stack((h_BSD, *hidden)))
        return self.mtp.attach_losses(logits, predicted, mtp)

    def _embed(self, tokens: Tensor, mtp: MTPInputs | None) -> list[Tensor]:
        """Embed the tokens, and those that each layer of multi-token prediction predicts from."""
        depth = self.model_args.n_mtp_layers
        if self.tok_embeddings is None:
            return list(tokens.chunk(depth + 1, dim=-1))
        if mtp is not None:
            return list(self.tok_embeddings(torch.stack((tokens, *mtp.tokens_BKS.unbind(1)))))
        x_BSD = self.tok_embeddings(tokens)
        # In evaluation, the parts of a pipeline send as many channels as in training.
        return [x_BSD] + [torch.zeros_like(x_BSD)] * (depth if self.output is None else 0)

    def extra_inputs(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        documents_BS: Tensor,
        queries_Q: Tensor | None = None,
        weights_BS: Tensor | None = None,
    ) -> dict[str, Any]:
        depth = self.model_args.n_mtp_layers
        if depth == 0 or not self.training:
            return {}
        apart = self.model_args.keeps_documents_apart
        how: Any = {"apart": apart, "weights_BS": weights_BS}
        inputs = mtp_inputs(tokens_BS, labels_BS, documents_BS, depth, **how)
        return {"mtp": inputs if queries_Q is None else inputs.at(queries_Q)}

    def blocks(self) -> dict[str, nn.Module]:
        return super().blocks() | {f"mtp.{k}": layer for k, layer in self._mtp_layers()}

    def moe_layers(self) -> dict[int, MoE]:
        first = self.model_args.n_layers
        return super().moe_layers() | {
            first + int(k): layer.block.moe for k, layer in self._mtp_layers()
        }

    def _mtp_layers(self) -> list[tuple[str, MTPLayer]]:
        return [] if self.mtp is None else self.mtp.numbered()

    def take_side_losses(self) -> dict[str, Tensor]:
        depth = self.model_args.n_mtp_layers
        sums = self.rope.new_zeros(depth) if self.mtp is None else self.mtp.take_losses()
        return {f"mtp_loss_{k + 1}": each for k, each in enumerate(sums)}

    def set_tokens_in_step(self, tokens: Tensor, labels: Tensor) -> None:
        super().set_tokens_in_step(tokens, labels)
        if self.mtp is not None:
            self.mtp.labels_in_step.copy_(labels)

    def set_coefficients(self, values: Mapping[str, float]) -> None:
        super().set_coefficients(values)
        if self.mtp is not None:
            self.mtp.loss_weight = values.get("mtp_loss_weight", self.mtp.loss_weight)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        super().init_weights(buffer_device)
        if self.mtp is not None:
            self.mtp.init_buffers()
