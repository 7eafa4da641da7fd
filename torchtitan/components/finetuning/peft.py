"""PEFT's format for adapters: adapter_config.json and adapter_model.safetensors.

Names are those of the family's Hugging Face files. Experts have an adapter each there, but
transformers 5 holds an MoE layer's experts as two stacks, gate above up and down, and PEFT (0.20
and later) stacks the adapters as it loads them: A of gate over A of up, with twice the rank and
twice the alpha. So gate and up of a layer must both be adapted, with one rank and one alpha.

PEFT takes the names gate_proj, up_proj and down_proj in `target_modules` for those of experts
wherever a model has any. In such models dense and shared feed-forwards are therefore named in
`target_parameters`, by their weights.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torchtitan.components.finetuning.lora import AdapterSize
from torchtitan.ops.lora import A, B
from torchtitan.protocols.state_dict_adapter import Piece
from torchtitan.tools.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FUSED = ("gate_proj", "up_proj", "down_proj")


def adapter_pieces(pieces: Iterable[Piece], sizes: Mapping[str, AdapterSize]) -> list[Piece]:
    """List the tensors of PEFT's file.

    pieces: of the model's own weights.
    sizes: of the adapters, by matrix.
    """
    found = []
    for piece in pieces:
        matrix = matrix_of(piece)
        if matrix not in sizes or piece.copy:
            continue
        rank, (out, into) = sizes[matrix].rank, piece.shape
        between = "." if piece.index is None else "_"
        for end, shape in ((A, (rank, into)), (B, (out, rank))):
            name = f"{_PREFIX}{_module(piece)}.{end}.weight"
            found.append(Piece(name, f"{matrix}{between}{end}", piece.index, shape))
    return found


def peft_config(
    pieces: Iterable[Piece], sizes: Mapping[str, AdapterSize], base: str | None
) -> dict[str, Any]:
    """Make adapter_config.json.

    pieces: of the model's own weights.
    base: folder or name of the model that is adapted, for the readers of the folder.
    """
    pieces = [piece for piece in pieces if len(piece.shape) == 2 and not piece.copy]
    has_experts = any(piece.index is not None for piece in pieces)
    modules: dict[str, AdapterSize] = {}
    parameters: dict[str, AdapterSize] = {}
    for piece in pieces:
        size = sizes.get(matrix_of(piece))
        if size is None:
            continue
        if piece.index is not None:
            stack = _stack(piece)
            twice = stack.endswith("gate_up_proj")
            parameters[stack] = AdapterSize(2 * size.rank, 2 * size.alpha) if twice else size
        elif has_experts and _module(piece).endswith(_FUSED):
            parameters[piece.name] = size
        else:
            modules[_module(piece)] = size
    by_target = modules | parameters
    first = Counter(by_target.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": _short(list(modules), pieces),
        "target_parameters": list(parameters) or None,
        "rank_pattern": {t: s.rank for t, s in by_target.items() if s.rank != first.rank},
        "alpha_pattern": {t: s.alpha for t, s in by_target.items() if s.alpha != first.alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def check_peft(sizes: Mapping[str, AdapterSize]) -> None:
    """Raise `UserError` for adapters that PEFT can't hold; their merged weights can be written."""
    way_out = "set lora.save_merged to true (convert_to_hf.py: --merged), or change lora.fqns"
    for matrix, size in sizes.items():
        if matrix.startswith("mtp."):
            raise UserError(
                f"{matrix} has an adapter, but PEFT's format can't hold it, because transformers "
                f"has no layers of multi-token prediction; {way_out}."
            )
        stem, _, end = matrix.rpartition(".")
        other = f"{stem}.{'w3' if end == 'w1' else 'w1'}"
        if stem.endswith("moe.experts") and end != "w2" and sizes.get(other) != size:
            raise UserError(
                f"{matrix} and {other} must have adapters of one rank and one alpha in PEFT's "
                "format, because transformers holds them as one tensor, but they have "
                f"{_words(size)} and {_words(sizes.get(other))}; {way_out}."
            )


def _words(size: AdapterSize | None) -> str:
    return "none" if size is None else f"rank {size.rank} with alpha {size.alpha:g}"


def matrix_of(piece: Piece) -> str:
    """Name the matrix of which a piece is the weight, or an expert's part of it."""
    return piece.ours if piece.index is not None else piece.ours.removesuffix(".weight")


def _module(piece: Piece) -> str:
    return piece.name.removesuffix(".weight")


def _stack(piece: Piece) -> str:
    """Name the stack, in transformers' model, that has an expert's matrix."""
    experts, leaf = _module(piece).rsplit(".", 2)[::2]
    return f"{experts}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"


def _short(modules: list[str], pieces: list[Piece]) -> list[str]:
    """Shorten names to their last part, where all modules of that last part are adapted."""

    def leaves(names: Iterable[str]) -> Counter[str]:
        return Counter(name.rpartition(".")[2] for name in names)

    has, adapted = leaves(map(_module, pieces)), leaves(modules)
    ends = {name: name.rpartition(".")[2] for name in modules}
    names = [end if adapted[end] == has[end] else name for name, end in ends.items()]
    return list(dict.fromkeys(names))
