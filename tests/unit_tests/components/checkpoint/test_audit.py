"""The audit of a conversion: what it reports, and that it finds what it is there for."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.scripts import script
from tests.unit_tests.components.checkpoint.test_convert import ARGS, NAMES, adapter
from torchtitan.components.checkpoint import convert as hf_convert
from torchtitan.components.checkpoint.audit import Audit
from torchtitan.components.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from torchtitan.components.huggingface.folder import HFFolder, HFWriter
from torchtitan.components.huggingface.load_save import save_hf
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.tools.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A toy model as a Hugging Face folder, with rotary frequencies, and as a checkpoint."""
    base = tmp_path_factory.mktemp("audit")
    torch.manual_seed(0)
    model = DeepSeekV3Model(ARGS)
    model.init_weights()
    save_hf(model, adapter(), base / "hf", dtype=torch.float32)
    file = next((base / "hf").glob("*.safetensors"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(load_file(file) | extra, file)
    (base / "hf/model.safetensors.index.json").unlink()
    hf_to_checkpoint(HFFolder(base / "hf"), base / "ours", adapter(), **NAMES)
    return base / "hf", base / "ours"


def report(target: Path) -> dict:
    return json.loads(target.with_name(f"{target.name}.audit.json").read_text())


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_every_tensor_of_the_folder_is_in_the_report(folders):
    hf, ours = folders
    data = report(ours)
    (tensors,) = [load_file(file) for file in hf.glob("*.safetensors")]
    extra = tensors.pop("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert extra is not None
    found = {each["theirs"]: each for each in data["tensors"]}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name]["shape"] == list(tensor.shape)
        assert found[name]["sha256"] == digest(tensor)
        assert found[name]["before"] == "f32" and found[name]["after"] == "float32"
    assert data["totals"] == {
        "tensors": len(tensors),
        "values": sum(tensor.numel() for tensor in tensors.values()),
        "rounded": 0,
        "read_back": len(tensors),
    }
    assert list(data["left_out"].values()) == [["model.layers.0.self_attn.rotary_emb.inv_freq"]]
    assert set(data["routing_changes"]) == {"layers.1", "layers.2"}
    assert max(data["routing_changes"].values()) == 0
    text = ours.with_name("ours.audit.txt").read_text()
    assert len(text.splitlines()) == 6
    assert f"all {len(tensors)} checksums match" in text


def test_the_way_out_tells_what_rounding_does(folders, tmp_path):
    hf, ours = folders
    checkpoint_to_hf(ours, tmp_path / "bf16", adapter(), dtype=torch.bfloat16)
    data = report(tmp_path / "bf16")
    (file,) = (tmp_path / "bf16").glob("*.safetensors")
    written, before = load_file(file), load_file(next(hf.glob("*.safetensors")))
    assert {each["theirs"]: each["sha256"] for each in data["tensors"]} == {
        name: digest(tensor) for name, tensor in written.items()
    }
    for each in data["tensors"]:
        name = each["theirs"]
        assert each["rounded"] == int((written[name].float() != before[name]).sum()), name
    assert data["totals"]["rounded"] > 1000
    assert max(data["routing_changes"].values()) > 0


def test_fp8_has_a_record_for_values_and_one_for_scales(folders, tmp_path):
    checkpoint_to_hf(folders[1], tmp_path / "fp8", adapter(), dtype=torch.bfloat16, fp8=True)
    data = report(tmp_path / "fp8")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    assert {each["theirs"] for each in data["tensors"]} == load_file(file).keys()
    assert data["forms"]["float32 -> float8_e4m3fn"] == data["forms"]["computed -> float32"]
    hf_to_checkpoint(HFFolder(tmp_path / "fp8"), tmp_path / "back", adapter(), **NAMES)
    back = report(tmp_path / "back")
    assert back["forms"]["fp8 -> bfloat16"] == data["forms"]["float32 -> float8_e4m3fn"]
    assert back["totals"]["values"] == data["totals"]["values"]


def test_a_file_that_lost_bytes_after_writing_is_found(folders, tmp_path, monkeypatch):
    close = HFWriter.close

    def close_and_spoil(self):
        close(self)
        place = self.layout.places["model.norm.weight"]
        with (self.folder / place.file).open("r+b") as file:
            file.seek(place.begin)
            file.write(b"\xff\xff")

    monkeypatch.setattr(HFWriter, "close", close_and_spoil)
    with pytest.raises(UserError, match="model.norm.weight came back with other bytes"):
        checkpoint_to_hf(folders[1], tmp_path / "out", adapter(), dtype=torch.float32)
    assert not (tmp_path / "out").exists()
    checkpoint_to_hf(
        folders[1], tmp_path / "blind", adapter(), dtype=torch.float32, read_back=False
    )
    assert report(tmp_path / "blind")["totals"]["read_back"] == 0


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_tensor_that_was_forgotten_or_written_twice_is_found(
    direction, folders, tmp_path, monkeypatch
):
    hf, ours = folders
    unit = "_write_chunks" if direction == "in" else "_write_piece"
    convert_unit = getattr(hf_convert, unit)

    def convert(target: Path) -> None:
        if direction == "in":
            hf_to_checkpoint(HFFolder(hf), target, adapter(), **NAMES)
        else:
            checkpoint_to_hf(ours, target, adapter(), dtype=torch.float32)

    def forgetful(*args, **kwargs):
        result = convert_unit(*args, **kwargs)
        records = result["audit"] if direction == "in" else result
        records[:] = [r for r in records if "experts.2.up_proj" not in r["theirs"]]
        return result

    monkeypatch.setattr(hf_convert, unit, forgetful)
    with pytest.raises(UserError, match="experts.2.up_proj.weight.* were not"):
        convert(tmp_path / "forgotten")

    def twice(*args, **kwargs):
        result = convert_unit(*args, **kwargs)
        records = result["audit"] if direction == "in" else result
        records += [r for r in records if "experts.2.up_proj" in r["theirs"]]
        return result

    monkeypatch.setattr(hf_convert, unit, twice)
    with pytest.raises(UserError, match="experts.2.up_proj.weight.* were not written whole, once"):
        convert(tmp_path / "twice")


def test_a_surplus_tensor_without_a_reason_is_not_left_out(folders, tmp_path):
    audit = Audit(folders[0], tmp_path / "out", report(folders[1])["tensors"])
    source = HFFolder(folders[0])
    source.file_of["model.layers.1.mlp.experts.9.up_proj.weight"] = "x"
    with pytest.raises(UserError, match="experts.9.up_proj.weight were not converted"):
        audit.check_consumed(source, adapter())


def test_the_scripts_can_leave_the_reading_back_out(folders, tmp_path):
    there = script("checkpoint_conversion/convert_from_hf.py")
    back = script("checkpoint_conversion/convert_to_hf.py")
    assert there.main([str(folders[0]), str(tmp_path / "ours"), "--no_read_back"]) == 0
    assert back.main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--no_read_back"]) == 0
    for name in ("ours", "hf"):
        assert report(tmp_path / name)["totals"]["read_back"] == 0
        assert "Read back: left out" in (tmp_path / f"{name}.audit.txt").read_text()
