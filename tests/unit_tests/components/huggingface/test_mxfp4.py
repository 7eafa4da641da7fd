"""MXFP4 folders: the format to the letter (transformers as oracle), every way to store it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.unit_tests.components.checkpoint.test_convert import ARGS, NAMES
from torchtitan.components.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3StateDictAdapter
from torchtitan.ops.mxfp4 import dequantize_mxfp4
from torchtitan.tools.errors import UserError

TOY = dataclasses.replace(ARGS, dim=64, moe_inter_dim=96)
ADAPTER = DeepSeekV3StateDictAdapter(TOY)


def random_pair(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(115, 125, (rows, columns // 32), dtype=torch.uint8, generator=generator)
    return packed, scales


def test_values_are_those_of_transformers():
    packed, scales = random_pair(7, 160)
    blocks = packed.view(1, 7, 5, 16)
    theirs = convert_moe_packed_tensors(blocks, scales.view(1, 7, 5), dtype=torch.float32)
    assert torch.equal(dequantize_mxfp4(packed, scales), theirs[0].T)  # theirs is transposed


def test_every_value_and_every_scale_by_the_specification():
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    scales = torch.arange(16, dtype=torch.uint8).view(16, 1) + 120
    found = dequantize_mxfp4(packed, scales).view(-1)
    for byte in range(256):
        for half, nibble in enumerate((byte & 15, byte >> 4)):
            exponent, mantissa = (nibble >> 1) & 3, nibble & 1
            value = mantissa / 2 if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa / 2)
            value *= (-1) ** (nibble >> 3) * 2.0 ** (int(scales[byte // 16, 0]) - 127)
            assert found[2 * byte + half].item() == value
    ends = torch.tensor([[0], [254], [255]], dtype=torch.uint8)
    ones = torch.full((3, 16), 0x22, dtype=torch.uint8)
    low, high, nan = dequantize_mxfp4(ones, ends)[:, 0].tolist()
    assert (low, high) == (2.0**-127, 2.0**127) and nan != nan


STORED = {
    "compressed-tensors": (".weight_packed", ".weight_scale", False, False),
    "DeepSeek-V4's experts": (".weight", ".scale", True, False),
    "gpt-oss": (".weight_blocks", ".weight_scales", False, True),
}


@pytest.fixture(params=STORED, ids=lambda name: name)
def folder(request, tmp_path) -> tuple[Path, dict[str, Tensor]]:
    """A folder with experts in MXFP4, and the values that they stand for."""
    values_end, scales_end, is_e8m0, in_blocks = STORED[request.param]
    model = DeepSeekV3Model(TOY)
    model.init_weights()
    save_hf(model, ADAPTER, tmp_path / "hf", dtype=torch.bfloat16)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors, expected = load_file(file), {}
    for n, name in enumerate([name for name in tensors if ".mlp.experts." in name]):
        rows, columns = tensors.pop(name).shape
        packed, scales = random_pair(rows, columns, seed=n)
        expected[name] = dequantize_mxfp4(packed, scales)
        stem = name.removesuffix(".weight")
        tensors[stem + values_end] = packed.view(rows, -1, 16) if in_blocks else packed
        tensors[stem + scales_end] = scales.view(torch.float8_e8m0fnu) if is_e8m0 else scales
    save_file(tensors, file)
    (tmp_path / "hf/model.safetensors.index.json").unlink()
    return tmp_path / "hf", expected


def test_a_run_and_a_conversion_read_the_same_values(folder, tmp_path):
    path, expected = folder
    model = DeepSeekV3Model(TOY)
    load_hf(model, ADAPTER, path, quantized=True)
    state = ADAPTER.to_hf(model.state_dict())
    assert len(expected) == 24
    for name, values in expected.items():
        assert torch.equal(state[name], values), name
    hf_to_checkpoint(HFFolder(path), tmp_path / "ours", ADAPTER, **NAMES)
    checkpoint_to_hf(tmp_path / "ours", tmp_path / "out", ADAPTER, dtype=torch.bfloat16)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    written = load_file(file)
    for name, values in expected.items():
        assert torch.equal(written[name].float(), values), name
    audit = json.loads((tmp_path / "ours.audit.json").read_text())
    assert audit["forms"]["mxfp4 -> bfloat16"] == 24 and audit["totals"]["rounded"] == 0


def test_every_part_of_a_weight_is_that_part_of_the_whole(folder):
    path, expected = folder
    source, (name, whole) = HFFolder(path), next(iter(expected.items()))
    for offset, shape in (
        ((0, 0), (3, 64)),
        ((5, 32), (9, 32)),
        ((1, 7), (4, 50)),
        ((2, 31), (1, 2)),
    ):
        (row, column), (rows, columns) = offset, shape
        part = whole[row : row + rows, column : column + columns]
        assert torch.equal(source.read(name, offset, shape), part)


def test_what_the_run_must_set_is_said(folder):
    path, _ = folder
    with pytest.raises(UserError, match="MXFP4 weights; set .*quantized to true"):
        load_hf(DeepSeekV3Model(TOY), ADAPTER, path)


def test_scales_of_another_shape_are_refused_by_name(folder):
    path, _ = folder
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    ends = tuple(scales for _, scales, *_ in STORED.values())
    name = next(name for name in tensors if name.endswith(ends))
    tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"has in other shapes {name} .* instead of"):
        load_hf(DeepSeekV3Model(TOY), ADAPTER, path, quantized=True)


def test_config_json_may_say_so():
    config = ADAPTER.hf_config()
    for quantization in (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    ):
        with_it = config | {"quantization_config": quantization}
        assert type(ADAPTER).args_of(with_it) == type(ADAPTER).args_of(config)
    for quantization in ({"quant_method": "compressed-tensors", "format": "pack-quantized"},):
        with pytest.raises(UserError, match="quantization_config.quant_method"):
            type(ADAPTER).args_of(config | {"quantization_config": quantization})
