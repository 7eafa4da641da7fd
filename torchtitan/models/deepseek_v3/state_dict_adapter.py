"""Hugging Face's names and layouts for DeepSeek-V2/V3, as a table.

Weights pair neighbouring rotary channels in both, so values are copied as they are; only the
experts change form: one matrix an expert there, stacks here.
"""

import re
from collections.abc import Set

import torch
from torch import Tensor

from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.tools.errors import UserError

# Ours to theirs; {} is the layer's number.
_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wq_a.weight": "model.layers.{}.self_attn.q_a_proj.weight",
    "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_a_layernorm.weight",
    "layers.{}.attention.wq_b.weight": "model.layers.{}.self_attn.q_b_proj.weight",
    "layers.{}.attention.wkv_a.weight": "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight",
    "layers.{}.attention.kv_norm.weight": "model.layers.{}.self_attn.kv_a_layernorm.weight",
    "layers.{}.attention.wkv_b.weight": "model.layers.{}.self_attn.kv_b_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.moe.router.gate.weight": "model.layers.{}.mlp.gate.weight",
    "layers.{}.moe.expert_bias": "model.layers.{}.mlp.gate.e_score_correction_bias",
    "layers.{}.moe.shared_experts.w1.weight": "model.layers.{}.mlp.shared_experts.gate_proj.weight",
    "layers.{}.moe.shared_experts.w2.weight": "model.layers.{}.mlp.shared_experts.down_proj.weight",
    "layers.{}.moe.shared_experts.w3.weight": "model.layers.{}.mlp.shared_experts.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Stacked over experts; the second {} is the expert's number.
_EXPERT_NAMES = {
    "layers.{}.moe.experts.w1": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers.{}.moe.experts.w2": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "layers.{}.moe.experts.w3": "model.layers.{}.mlp.experts.{}.up_proj.weight",
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class DeepSeekV3StateDictAdapter(StateDictAdapter):
    """Whole state dicts of plain tensors, in and out; experts are copied, the rest is shared."""

    model_args: DeepSeekV3ModelArgs

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs_to_ours = {theirs: ours for ours, theirs in _NAMES.items()}
        experts_to_ours = {theirs: ours for ours, theirs in _EXPERT_NAMES.items()}
        out: dict[str, Tensor] = {}
        stacks: dict[str, dict[int, Tensor]] = {}
        surplus = []
        for name, tensor in hf_state_dict.items():
            numbers = [int(n) for n in _NUMBER.findall(name)]
            form = _NUMBER.sub("{}", name)
            if numbers and numbers[0] == self.model_args.n_layers:
                continue  # multi-token prediction's extra layer
            if form in theirs_to_ours:
                out[theirs_to_ours[form].format(*numbers)] = tensor
            elif form in experts_to_ours:
                layer, expert = numbers
                stacks.setdefault(experts_to_ours[form].format(layer), {})[expert] = tensor
            else:
                surplus.append(name)
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
        with torch.device("meta"):
            expected = DeepSeekV3Model(self.model_args).state_dict().keys()
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
            numbers = _NUMBER.findall(name)
            form = _NUMBER.sub("{}", name)
            if form in _NAMES:
                out[_NAMES[form].format(*numbers)] = tensor
            else:
                for expert, weight in enumerate(tensor):
                    # clone: safetensors refuses tensors that share storage
                    out[_EXPERT_NAMES[form].format(*numbers, expert)] = weight.clone()
        return out
