"""Hugging Face's names and layouts for DeepSeek-V2/V3, as one table.

Both V2 and V3 (and Moonlight and Kimi-K2, which are V3) use these names. The published weights pair
neighbouring rotary channels, as we do. A folder whose config.json has `rope_interleave: false`
pairs the two halves of the rotary channels instead, and its rows are reordered (`row_order`).
"""

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchtitan.models.decoder.hf_config import ConfigReader
from torchtitan.models.decoder.state_dict_adapter import (
    BLOCK_ROWS,
    END_ROWS,
    Row,
    TableAdapter,
    in_layers,
)
from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.hf_config import (
    check_export,
    config_notes,
    make_hf_config,
    read_hf_config,
    reader_notes,
)
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.protocols.state_dict_adapter import Piece

_BLOCK = BLOCK_ROWS | {
    "attention.wq.weight": Row("self_attn.q_proj.weight", fp8=True, rope=True),
    "attention.wq_a.weight": Row("self_attn.q_a_proj.weight", fp8=True),
    "attention.q_norm.weight": Row("self_attn.q_a_layernorm.weight"),
    "attention.wq_b.weight": Row("self_attn.q_b_proj.weight", fp8=True, rope=True),
    "attention.wkv_a.weight": Row("self_attn.kv_a_proj_with_mqa.weight", fp8=True, rope=True),
    "attention.kv_norm.weight": Row("self_attn.kv_a_layernorm.weight"),
    "attention.wkv_b.weight": Row("self_attn.kv_b_proj.weight", fp8=True),
    "moe.expert_bias": Row("mlp.gate.e_score_correction_bias", fp32=True, from_zero=True),
    "moe.shared_experts.w1.weight": Row("mlp.shared_experts.gate_proj.weight", fp8=True),
    "moe.shared_experts.w2.weight": Row("mlp.shared_experts.down_proj.weight", fp8=True),
    "moe.shared_experts.w3.weight": Row("mlp.shared_experts.up_proj.weight", fp8=True),
}
# Multi-token prediction: in their files, layers after the last one, so {} is n_layers + our number.
_BESIDE_BLOCK = {
    "enorm.weight": Row("enorm.weight"),
    "hnorm.weight": Row("hnorm.weight"),
    "eh_proj.weight": Row("eh_proj.weight"),
    "norm.weight": Row("shared_head.norm.weight"),
}
# Copies of the model's own tensors in those layers, which some readers of a single layer need.
_COPIES = {
    "tok_embeddings.weight": "embed_tokens.weight",
    "output.weight": "shared_head.head.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class DeepSeekV3StateDictAdapter(TableAdapter):
    model_args: DeepSeekV3ModelArgs
    model_cls = DeepSeekV3Model
    model_types = ("deepseek_v2", "deepseek_v3", "kimi_k2")
    table = (
        END_ROWS
        | in_layers("layers.{}", _BLOCK)
        | in_layers("mtp.{}.block", _BLOCK)
        | in_layers("mtp.{}", _BESIDE_BLOCK)
    )

    def numbers_of(self, ours: str) -> list[int]:
        first = self.model_args.n_layers if ours.startswith("mtp.") else 0
        return [first + number for number in super().numbers_of(ours)]

    def sizes(self, model_args: DeepSeekV3ModelArgs) -> dict[str, Any]:
        names = (
            "vocab_size dim n_layers n_dense_layers n_heads q_lora_rank kv_lora_rank "
            "qk_nope_head_dim qk_rope_head_dim v_head_dim"
        ).split()
        moe = model_args.moe_args
        sizes = {name: getattr(model_args, name) for name in names} | model_args.dense_widths
        if model_args.n_dense_layers < model_args.n_layers:
            sizes["moe_inter_dim"] = model_args.moe_inter_dim
            sizes["moe_args.num_experts"] = moe.num_experts
            sizes["moe_args.num_shared_experts"] = moe.num_shared_experts
        return sizes

    def explain(self, names: Set[str]) -> str | None:
        first, wanted = self.model_args.n_layers, self.model_args.n_mtp_layers
        layers = {int(layer[1]) for layer in map(_LAYER.match, names) if layer}
        has = len([number for number in layers if number >= first])
        if has < wanted and set(range(first)) <= layers:
            return (
                f"it has {has or 'no'} layers of multi-token prediction after its {first} layers, "
                f"but this model has {wanted}: set model.args.n_mtp_layers to {has}"
            )
        return super().explain(names)

    def _pieces_of(self, ours: str, shape: torch.Size) -> list[Piece]:
        pieces = super()._pieces_of(ours, shape)
        if ours in _COPIES:
            first = self.model_args.n_layers
            for number in range(first, first + self.model_args.n_mtp_layers):
                name = f"model.layers.{number}.{_COPIES[ours]}"
                pieces.append(replace(pieces[0], name=name, copy=True))
        return pieces

    def left_out(self, name: str) -> str | None:
        if (layer := _LAYER.match(name)) is None:
            return super().left_out(name)
        first = self.model_args.n_layers
        if int(layer[1]) >= first + self.model_args.n_mtp_layers:
            return "multi-token prediction, which this model does not have"
        if int(layer[1]) >= first and name.removeprefix(layer[0]) in _COPIES.values():
            return "multi-token prediction's copies of embedding and head, which it shares here"
        return super().left_out(name)

    def row_order(self, piece: Piece, hf_config: Mapping[str, Any]) -> Tensor | None:
        if not self.row_of(piece.ours).rope or hf_config.get("rope_interleave", True):
            return None
        args, rows = self.model_args, torch.arange(piece.shape[0])
        head_size = piece.shape[0] if "wkv_a" in piece.ours else args.qk_head_dim
        heads = rows.view(-1, head_size).clone()
        halves = heads[:, -args.qk_rope_head_dim :].unflatten(1, (2, -1))
        heads[:, -args.qk_rope_head_dim :] = halves.transpose(1, 2).flatten(1)
        return heads.flatten()

    def hf_config(self) -> dict[str, Any]:
        return make_hf_config(self.model_args)

    def check_export(self) -> None:
        check_export(self.model_args)

    def notes(self) -> list[str]:
        return reader_notes(self.model_args)

    @classmethod
    def read_config(cls, config: ConfigReader) -> DeepSeekV3ModelArgs:
        return read_hf_config(config)

    @classmethod
    def config_notes(cls, config: ConfigReader) -> list[str]:
        return config_notes(config)
