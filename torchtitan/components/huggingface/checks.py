"""Checks that a Hugging Face folder fits a model. Errors give the reason, or names of tensors."""

from collections.abc import Iterator

import torch

from torchtitan.components.huggingface.folder import CONFIG, SCALE, HFFolder
from torchtitan.ops.block_fp8 import BLOCK, scale_shape
from torchtitan.ops.mxfp4 import is_mxfp4
from torchtitan.protocols.state_dict_adapter import Piece, StateDictAdapter
from torchtitan.tools.errors import UserError, some

READABLE = ("fp8", "mxfp4", "f64", "f32", "f16", "bf16")  # see `HFFolder.form`
_ROWS = 1024  # rows compared at a time: 15 MB of DeepSeek-V3's embedding


def check_sizes(folder: HFFolder, adapter: StateDictAdapter) -> None:
    """Raise `UserError` where config.json describes an unsupported architecture, or other sizes.

    Sizes decide the names and shapes of tensors.
    """
    if not folder.config:
        return
    ours = adapter.sizes(adapter.model_args)
    theirs = adapter.sizes(adapter.args_of(folder.config))
    differing = [
        f"{name} = {theirs[name]} (the run has {ours[name]})"
        for name in theirs
        if ours.get(name, theirs[name]) != theirs[name]
    ]
    if differing:
        raise UserError(
            f"{folder.path / CONFIG} describes a model of other sizes: {some(differing, ', ')}; "
            'set these in [model.args], choose the model.flavor that has them ("from_hf" always '
            "does), or name the folder of this run's model."
        )


def check_names(folder: HFFolder, adapter: StateDictAdapter) -> None:
    """Raise `UserError` for tensors that are missing, or that the model does not have."""
    wanted = {piece.name for piece in adapter.pieces() if not piece.copy}
    scales = {name for name in folder.file_of if name.endswith(SCALE)}
    missing = wanted - folder.file_of.keys()
    missing |= {s for s in scales if s.removesuffix(SCALE) not in folder.file_of}
    surplus = folder.file_of.keys() - wanted - scales
    surplus = {name for name in surplus if adapter.left_out(name) is None}
    refuse(folder, adapter, {"lacks": sorted(missing), "also has": sorted(surplus)})


def check_shapes(folder: HFFolder, adapter: StateDictAdapter, pieces: list[Piece]) -> None:
    """Raise `UserError` for tensors of other shapes than the model's, and for quantized tensors
    without fitting scales."""
    lacking, wrong, unreadable = [], [], []
    for piece in pieces:
        if piece.name in folder.packed and (problem := folder.packing_problem(piece.name)):
            wrong.append(problem)
            continue
        expected = {piece.name: piece.shape}
        if folder.is_fp8(piece.name):
            expected[piece.name + SCALE] = scale_shape(piece.shape)
        for name, shape in expected.items():
            if name not in folder.file_of:
                lacking.append(name)
            elif (theirs := folder.shape(name)) != shape:
                wrong.append(f"{name} {_by(theirs)} instead of {_by(shape)}")
        if (form := folder.form(piece.name)) not in READABLE:
            unreadable.append(f"{piece.name} ({form})")
    problems = {"lacks": lacking, "has in other shapes": wrong}
    refuse(folder, adapter, problems | {"has as quantized or whole numbers": unreadable})


def refuse(folder: HFFolder, adapter: StateDictAdapter, problems: dict[str, list[str]]) -> None:
    """Raise `UserError` where any problem exists, with its reason if known, else the first names.

    problems: names of tensors, by verb of the sentence.
    """
    found = [f"{verb} {some(names)}" for verb, names in problems.items() if names]
    if not found:
        return
    reason = _quantization(folder) or adapter.explain(folder.file_of.keys())
    if reason:
        raise UserError(f"{folder.path} does not hold this model: {reason}.")
    raise UserError(
        f"{folder.path} does not hold this model: it {', and '.join(found)}. Choose the "
        "model.flavor and model.args that its config.json describes."
    )


def _quantization(folder: HFFolder) -> str | None:
    """Describe the folder's form of quantized weights, where it is not supported; else None."""
    settings = folder.config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method, block = settings.get("quant_method"), settings.get("weight_block_size")
    if (method == "fp8" and block == [BLOCK, BLOCK]) or is_mxfp4(settings):
        return None
    return (
        f"its {CONFIG} has a quantization_config with quant_method = {method!r} and "
        f"weight_block_size = {block!r}, while quantized weights are read as 'fp8' with "
        f"[{BLOCK}, {BLOCK}] or as MXFP4 only; name the folder of weights that are not quantized"
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


# ------------------------------------------------------------------ copies


def copies_that_differ(
    folder: HFFolder, adapter: StateDictAdapter, *, reader: int = 0, readers: int = 1
) -> list[str]:
    """Name the copies in the folder that differ from their originals.

    `readers` processes share the rows between them; this one checks its own part.
    """
    pieces = adapter.pieces()
    original = {piece.ours: piece.name for piece in pieces if not piece.copy}
    copies = [piece for piece in pieces if piece.copy and piece.name in folder.file_of]

    def equal(one: str, other: str, shape: tuple[int, ...]) -> bool:
        return folder.shape(one) == shape and all(
            torch.equal(folder.read(one, *box).double(), folder.read(other, *box).double())
            for box in _boxes(shape, reader, readers)
        )

    return [p.name for p in copies if not equal(p.name, original[p.ours], p.shape)]


def _boxes(
    shape: tuple[int, ...], reader: int, readers: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and shapes of this reader's parts of a matrix."""
    for begin in range(reader * _ROWS, shape[0], readers * _ROWS):
        yield (begin, 0), (min(_ROWS, shape[0] - begin), shape[1])
