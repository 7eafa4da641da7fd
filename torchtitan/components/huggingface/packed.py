"""Names under which a folder holds MXFP4 weights: a pair of tensors for each weight."""

from collections.abc import Mapping
from typing import NamedTuple

# Ends of the names: of the weight, its values, its scales.
_ENDS = (
    (".weight", ".weight_packed", ".weight_scale"),  # compressed-tensors
    (".weight", ".weight", ".scale"),  # as DeepSeek-V4's experts
    (".weight", ".weight_blocks", ".weight_scales"),  # as gpt-oss: values (rows, groups, 16)
)


class Packed(NamedTuple):
    """Tensors of one weight.

    values: name of the tensor with two values a byte.
    scales: name of the tensor with the scales.
    """

    values: str
    scales: str


def find_packed(file_of: Mapping[str, str]) -> dict[str, Packed]:
    """Find the weights that are stored as pairs, by the name that the weight itself would have."""
    found = {}
    for whole, values, scales in _ENDS:
        for name in file_of:
            if name.endswith(scales) and (stem := name.removesuffix(scales)) + values in file_of:
                found[stem + whole] = Packed(stem + values, name)
    return found


def unpacked_shape(stored: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the weight whose values are stored in this shape."""
    rows, *rest = stored
    columns = 2
    for size in rest:
        columns *= size
    return rows, columns
