"""Hugging Face's names and layouts as one table per family, and the rows that all families share.

Values are copied unchanged; only the experts change form (one matrix per expert in their files, one
stack here).
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.decoder.hf_config import ConfigReader, check_quantization, expect
from torchtitan.models.decoder.routing_change import routing_change
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.state_dict_adapter import Piece, StateDictAdapter, warn_of_copies
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of the table.

    theirs: their name; {} is the layer's number, for stacks of experts a second {} the expert's.
    fp8, fp32, from_zero: see `Piece`.
    rope: whether some of its rows are rotary channels.
    """

    theirs: str
    fp8: bool = False
    fp32: bool = False
    from_zero: bool = False
    rope: bool = False


# Names inside of a layer, ours to theirs. fp8: matrices that are FP8 in official FP8 files;
# embedding, head, norms and the router's gate are bf16 in these.
BLOCK_ROWS = {
    "attention_norm.weight": Row("input_layernorm.weight"),
    "attention.wo.weight": Row("self_attn.o_proj.weight", fp8=True),
    "ffn_norm.weight": Row("post_attention_layernorm.weight"),
    "feed_forward.w1.weight": Row("mlp.gate_proj.weight", fp8=True),
    "feed_forward.w2.weight": Row("mlp.down_proj.weight", fp8=True),
    "feed_forward.w3.weight": Row("mlp.up_proj.weight", fp8=True),
    "moe.router.gate.weight": Row("mlp.gate.weight"),
    "moe.experts.w1": Row("mlp.experts.{}.gate_proj.weight", fp8=True),
    "moe.experts.w2": Row("mlp.experts.{}.down_proj.weight", fp8=True),
    "moe.experts.w3": Row("mlp.experts.{}.up_proj.weight", fp8=True),
}
END_ROWS = {
    "tok_embeddings.weight": Row("model.embed_tokens.weight"),
    "norm.weight": Row("model.norm.weight"),
    "output.weight": Row("lm_head.weight"),
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_HEAD, _BIAS = END_ROWS["output.weight"].theirs, ".e_score_correction_bias"
_GATE = re.compile(r"layers\.(\d+)\.moe\.router\.gate\.weight")


def in_layers(ours: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    """Prefix the rows of a block: our names with `ours`, theirs with `model.layers.{}`."""
    return {
        f"{ours}.{name}": replace(row, theirs=f"model.layers.{{}}.{row.theirs}")
        for name, row in rows.items()
    }


class TableAdapter(StateDictAdapter):
    """Adapter that is defined by a table.

    A family defines `table` (with {} for numbers in our names), `model_cls`, `model_types`,
    `read_config` (which returns the arguments; missing keys raise KeyError), `sizes` and
    `hf_config`.

    Converts whole state dicts of plain tensors; experts are copied, other tensors share memory.
    """

    table: ClassVar[Mapping[str, Row]]
    model_cls: ClassVar[type[BaseModel]]
    model_args: DecoderArgs

    @classmethod
    def args_of(cls, hf_config: Mapping[str, Any]) -> DecoderArgs:
        return cls._read(ConfigReader(hf_config))

    @classmethod
    def _read(cls, config: ConfigReader) -> DecoderArgs:
        expect("model_type", config.get("model_type"), *cls.model_types)
        try:
            args = cls.read_config(config)
            config.refuse_other_models()
            check_quantization(config)
            return args
        except KeyError as error:
            raise UserError(
                f"config.json lacks {error}, which describes the model; download it again, or add "
                "the key."
            ) from None
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"config.json has a value of the wrong type ({error}); download it again."
            ) from None

    @classmethod
    def read_config(cls, config: ConfigReader) -> DecoderArgs:
        raise NotImplementedError

    @classmethod
    def notes_on(cls, hf_config: Mapping[str, Any]) -> list[str]:
        config = ConfigReader(hf_config)
        cls._read(config)
        notes = cls.config_notes(config)
        if unread := config.unread():
            notes.append(
                f"{', '.join(unread)}: unknown here and ignored; if the model depends on it, these "
                "weights compute something else here"
            )
        return notes

    @classmethod
    def config_notes(cls, config: ConfigReader) -> list[str]:
        """Notes on the family's own keys, for `notes_on`."""
        return []

    def row_of(self, ours: str) -> Row:
        row = self.table.get(_NUMBER.sub("{}", ours))
        if row is None:
            raise UserError(
                f"Hugging Face's files can't contain {ours}; use arguments of the model without "
                "it (model.args.moe_args.load_balance_coeff adds the expert_bias)."
            )
        return row

    def numbers_of(self, ours: str) -> list[int]:
        """Return the numbers for the {} of their name."""
        return [int(number) for number in _NUMBER.findall(ours)]

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of our state dict, in the model's order."""
        with torch.device("meta"):
            model = self.model_cls(self.model_args)
        return {name: tensor.shape for name, tensor in model.state_dict().items()}

    def pieces(self) -> list[Piece]:
        shapes = self.shapes.items()
        return [piece for name, shape in shapes for piece in self._pieces_of(name, shape)]

    def _pieces_of(self, ours: str, shape: torch.Size) -> list[Piece]:
        row, numbers = self.row_of(ours), self.numbers_of(ours)
        kinds = {"fp32": row.fp32, "fp8": row.fp8, "from_zero": row.from_zero}
        if row.theirs.count("{}") <= len(numbers):
            return [Piece(row.theirs.format(*numbers), ours, None, tuple(shape), **kinds)]
        return [
            Piece(row.theirs.format(*numbers, expert), ours, expert, tuple(shape[1:]), **kinds)
            for expert in range(shape[0])
        ]

    def left_out(self, name: str) -> str | None:
        if name.endswith(".rotary_emb.inv_freq"):
            return "rotary frequencies, which are computed"
        return None

    def explain(self, names: Set[str]) -> str | None:
        """Explain from names alone, where config.json is missing or doesn't help."""
        wanted = {piece.name for piece in self.pieces() if not piece.copy}
        if wanted - names == {_HEAD}:
            return (
                "its head is its embedding (tie_word_embeddings), but models here have a matrix "
                f"for each: add {_HEAD}, a copy of the embedding, to the folder"
            )
        biased, wants_bias = (any(n.endswith(_BIAS) for n in each) for each in (names, wanted))
        if biased != wants_bias:
            has, value = ("have no", '"none"') if wants_bias else ("have a", "0 or more")
            return f"its experts {has} bias; set model.args.moe_args.load_balance_coeff to {value}"
        return None

    def row_order(self, piece: Piece, hf_config: Mapping[str, Any]) -> Tensor | None:
        return None

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        theirs = {name: t for name, t in hf_state_dict.items() if not self.left_out(name)}
        pieces = [piece for piece in self.pieces() if not piece.copy]
        known = {piece.name for piece in pieces}
        for problem, wrong in (("lacks", known - theirs.keys()), ("has", theirs.keys() - known)):
            if wrong:
                raise UserError(
                    f"the Hugging Face state dict {problem} {min(wrong)} (and {len(wrong) - 1} "
                    "other names), unlike the model of these model.args: make them match its "
                    "config.json (with model.args.moe_args.load_balance_coeff experts have a bias)."
                )
        self._compare_copies(hf_state_dict)
        parts: dict[str, list[Tensor]] = {}
        for piece in pieces:
            parts.setdefault(piece.ours, []).append(theirs[piece.name])
        stacks = {piece.ours for piece in pieces if piece.index is not None}
        return {n: torch.stack(each) if n in stacks else each[0] for n, each in parts.items()}

    def _compare_copies(self, hf_state_dict: dict[str, Tensor]) -> None:
        pieces = self.pieces()
        original = {piece.ours: piece.name for piece in pieces if not piece.copy}
        copies = {p.name: original[p.ours] for p in pieces if p.copy and p.name in hf_state_dict}
        differing = [
            name
            for name, other in copies.items()
            if not torch.equal(hf_state_dict[name], hf_state_dict[other])
        ]
        warn_of_copies("the Hugging Face state dict", differing)

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            for piece in self._pieces_of(name, tensor.shape):
                # clone: safetensors refuses tensors that share storage
                part = tensor if piece.index is None else tensor[piece.index]
                out[piece.name] = part if part is tensor and not piece.copy else part.clone()
        return out

    # ------------------------------------------------------------------ routing

    def router_names(self) -> list[str]:
        ends = ("moe.router.gate.weight", "moe.expert_bias", "ffn_norm.weight")
        layers = [match[1] for match in map(_GATE.fullmatch, self.shapes) if match]
        names = [f"layers.{layer}.{end}" for layer in layers for end in ends]
        return [name for name in names if name in self.shapes]

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
