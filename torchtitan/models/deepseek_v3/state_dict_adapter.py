"""Hugging Face's names and layouts for DeepSeek-V2/V3, as one table.

Both V2 and V3 (and Moonlight and Kimi-K2, which are V3) use these names. The published weights pair
neighbouring rotary channels, as we do, so values are copied as they are; only the experts change
form (one matrix an expert there, stacks here). A folder whose config.json says
`rope_interleave: false` has the two halves of the rotary channels apart, and gets its rows put in
order (`row_order`).
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.hf_config import check_export, make_hf_config, read_hf_config
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.models.deepseek_v3.routing_change import routing_change
from torchtitan.protocols.state_dict_adapter import Piece, StateDictAdapter
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class _Row:
    """theirs: {} is the layer's number, for stacks over experts a second {} the expert's.
    The rest: see `Piece`; rope: has rotary channels among its rows.
    """

    theirs: str
    fp8: bool = False
    fp32: bool = False
    centred: bool = False
    rope: bool = False


# Ours (inside of a layer, then outside) to theirs. FP8: the matrices that the official FP8 files
# hold in FP8; embedding, head, norms and the router's gate stay in bf16 there, the bias in fp32.
_IN_LAYER = {
    "attention_norm.weight": _Row("input_layernorm.weight"),
    "attention.wq.weight": _Row("self_attn.q_proj.weight", fp8=True, rope=True),
    "attention.wq_a.weight": _Row("self_attn.q_a_proj.weight", fp8=True),
    "attention.q_norm.weight": _Row("self_attn.q_a_layernorm.weight"),
    "attention.wq_b.weight": _Row("self_attn.q_b_proj.weight", fp8=True, rope=True),
    "attention.wkv_a.weight": _Row("self_attn.kv_a_proj_with_mqa.weight", fp8=True, rope=True),
    "attention.kv_norm.weight": _Row("self_attn.kv_a_layernorm.weight"),
    "attention.wkv_b.weight": _Row("self_attn.kv_b_proj.weight", fp8=True),
    "attention.wo.weight": _Row("self_attn.o_proj.weight", fp8=True),
    "ffn_norm.weight": _Row("post_attention_layernorm.weight"),
    "feed_forward.w1.weight": _Row("mlp.gate_proj.weight", fp8=True),
    "feed_forward.w2.weight": _Row("mlp.down_proj.weight", fp8=True),
    "feed_forward.w3.weight": _Row("mlp.up_proj.weight", fp8=True),
    "moe.router.gate.weight": _Row("mlp.gate.weight"),
    "moe.expert_bias": _Row("mlp.gate.e_score_correction_bias", fp32=True, centred=True),
    "moe.experts.w1": _Row("mlp.experts.{}.gate_proj.weight", fp8=True),
    "moe.experts.w2": _Row("mlp.experts.{}.down_proj.weight", fp8=True),
    "moe.experts.w3": _Row("mlp.experts.{}.up_proj.weight", fp8=True),
    "moe.shared_experts.w1.weight": _Row("mlp.shared_experts.gate_proj.weight", fp8=True),
    "moe.shared_experts.w2.weight": _Row("mlp.shared_experts.down_proj.weight", fp8=True),
    "moe.shared_experts.w3.weight": _Row("mlp.shared_experts.up_proj.weight", fp8=True),
}
_TABLE = {
    "tok_embeddings.weight": _Row("model.embed_tokens.weight"),
    **{
        f"layers.{{}}.{ours}": _Row(**{**vars(row), "theirs": f"model.layers.{{}}.{row.theirs}"})
        for ours, row in _IN_LAYER.items()
    },
    "norm.weight": _Row("model.norm.weight"),
    "output.weight": _Row("lm_head.weight"),
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_GATE = re.compile(r"layers\.(\d+)\.moe\.router\.gate\.weight")


def _row_of(ours: str) -> tuple[_Row, list[str]]:
    """The table's row for one of our names, and the numbers in it."""
    return _TABLE[_NUMBER.sub("{}", ours)], _NUMBER.findall(ours)


class DeepSeekV3StateDictAdapter(StateDictAdapter):
    """The table of a model's tensors, and whole state dicts of plain tensors in and out (experts
    are copied there, the rest is shared)."""

    model_args: DeepSeekV3ModelArgs

    # ------------------------------------------------------------------ the table

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Of our state dict, in the model's order."""
        with torch.device("meta"):
            return {n: t.shape for n, t in DeepSeekV3Model(self.model_args).state_dict().items()}

    def pieces(self) -> list[Piece]:
        return [piece for name, shape in self._shapes.items() for piece in _pieces_of(name, shape)]

    def left_out(self, name: str) -> str | None:
        if name.endswith(".rotary_emb.inv_freq"):
            return "rotary frequencies, which are computed"
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= self.model_args.n_layers:
            return "multi-token prediction, which this model has not"
        return None

    def row_order(self, piece: Piece, hf_config: Mapping[str, Any]) -> Tensor | None:
        row, _ = _row_of(piece.ours)
        if not row.rope or hf_config.get("rope_interleave", True):
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

    @classmethod
    def args_of(cls, hf_config: Mapping[str, Any]) -> DeepSeekV3ModelArgs:
        return read_hf_config(hf_config)

    # ------------------------------------------------------------------ routing

    def router_names(self) -> list[str]:
        ends = ("moe.router.gate.weight", "moe.expert_bias", "ffn_norm.weight")
        layers = [match[1] for match in map(_GATE.fullmatch, self._shapes) if match]
        names = [f"layers.{layer}.{end}" for layer in layers for end in ends]
        return [name for name in names if name in self._shapes]

    def routing_changes(
        self, state: Mapping[str, Tensor], written: Mapping[str, Tensor]
    ) -> dict[str, float]:
        changes = {}
        for name in state:
            if match := _GATE.fullmatch(name):
                layer = f"layers.{match[1]}"
                before, after = (
                    (each[name], each.get(f"{layer}.moe.expert_bias")) for each in (state, written)
                )
                norm = state[f"{layer}.ffn_norm.weight"]
                changes[layer] = routing_change(self.model_args, before, after, norm)
        return changes

    # ------------------------------------------------------------------ whole state dicts

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs_to_ours = {row.theirs: ours for ours, row in _TABLE.items()}
        out: dict[str, Tensor] = {}
        stacks: dict[str, dict[int, Tensor]] = {}
        surplus = []
        for name, tensor in hf_state_dict.items():
            numbers = [int(n) for n in _NUMBER.findall(name)]
            ours = theirs_to_ours.get(_NUMBER.sub("{}", name))
            if self.left_out(name):
                continue
            if ours is None:
                surplus.append(name)
            elif len(numbers) == 2:
                stacks.setdefault(ours.format(numbers[0]), {})[numbers[1]] = tensor
            else:
                out[ours.format(*numbers)] = tensor
        if surplus:
            raise UserError(
                "the Hugging Face state dict has tensors that model.name 'deepseek_v3' doesn't "
                f"know: {', '.join(sorted(surplus))}; use the weights of a DeepSeek-V2 or -V3 "
                "model."
            )
        for name, experts in stacks.items():
            out[name] = self._stack(name, experts)
        self._check_names(out.keys())
        return out

    def _check_names(self, names: Set[str]) -> None:
        expected = self._shapes.keys()
        for problem, wrong in (
            ("lacks what becomes", expected - names),
            ("holds what would become", names - expected),
        ):
            if wrong:
                raise UserError(
                    f"the Hugging Face state dict {problem} {min(wrong)} (and {len(wrong) - 1} "
                    "other names), unlike the model of these model.args: make them match its "
                    "config.json (model.args.moe_args.load_balance_coeff says whether there is an "
                    "expert_bias)."
                )

    def _stack(self, name: str, experts: dict[int, Tensor]) -> Tensor:
        expected = range(self.model_args.moe_args.num_experts)
        if sorted(experts) != list(expected):
            raise UserError(
                f"{name} needs num_experts ({len(expected)}) experts, but the Hugging Face state "
                f"dict holds {len(experts)}: set model.args.moe_args.num_experts to match its "
                "config.json."
            )
        return torch.stack([experts[e] for e in expected])

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            for piece in _pieces_of(name, tensor.shape):
                # clone: safetensors refuses tensors that share storage
                out[piece.name] = tensor if piece.index is None else tensor[piece.index].clone()
        return out


def _pieces_of(ours: str, shape: torch.Size) -> list[Piece]:
    row, numbers = _row_of(ours)
    kinds = {"fp32": row.fp32, "fp8": row.fp8, "centred": row.centred}
    if row.theirs.count("{}") <= len(numbers):
        return [Piece(row.theirs.format(*numbers), ours, None, tuple(shape), **kinds)]
    return [
        Piece(row.theirs.format(*numbers, expert), ours, expert, tuple(shape[1:]), **kinds)
        for expert in range(shape[0])
    ]
