"""Conversion in pieces: gone on with after Ctrl-C, refused by name, in the memory of one file."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from tests.scripts import script
from torchtitan.components.checkpoint import convert as hf_convert
from torchtitan.components.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from torchtitan.components.checkpoint.dcp_storage import CheckpointReader
from torchtitan.components.checkpoint.folder import damage
from torchtitan.components.checkpoint.progress import ConversionProgress
from torchtitan.components.huggingface import load_save
from torchtitan.components.huggingface.folder import HFFolder, plan_layout
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    DeepSeekV3ModelArgs,
    DeepSeekV3StateDictAdapter,
)
from torchtitan.models.moe import MoEArgs
from torchtitan.tools.errors import UserError

ARGS = DeepSeekV3ModelArgs(
    vocab_size=64,
    max_seq_len=32,
    dim=16,
    inter_dim=24,
    moe_inter_dim=8,
    n_layers=3,
    n_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    moe_args=MoEArgs(num_experts=4, top_k=2, score_before_experts=False),
)
FILE_BYTES = 6000
NAMES = {"model": "deepseek_v3", "flavor": "toy"}


def adapter() -> DeepSeekV3StateDictAdapter:
    return DeepSeekV3StateDictAdapter(ARGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The same toy model as a Hugging Face folder of several files, and as a checkpoint."""
    base = tmp_path_factory.mktemp("toy")
    model = DeepSeekV3Model(ARGS)
    model.init_weights()
    save_hf(model, adapter(), base / "one-file", dtype=torch.float32)
    hf_to_checkpoint(HFFolder(base / "one-file"), base / "first", adapter(), **NAMES)
    options = {"dtype": torch.float32, "max_file_bytes": FILE_BYTES}
    checkpoint_to_hf(base / "first", base / "hf", adapter(), **options)
    hf_to_checkpoint(HFFolder(base / "hf"), base / "ours", adapter(), **NAMES)
    return base / "hf", base / "ours"


def test_a_converted_checkpoint_is_whole_and_dcp_loads_it(folders):
    hf, ours = folders
    assert len(list(hf.glob("*.safetensors"))) > 5
    assert damage(ours) is None
    expected, model = DeepSeekV3Model(ARGS), DeepSeekV3Model(ARGS)
    load_hf(expected, adapter(), hf)
    model.init_weights()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.load(state, storage_reader=CheckpointReader(ours), no_dist=True)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All but what says when it was written."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {n: b for n, b in files.items() if n not in ("meta.json", "manifest.json", "COMPLETE")}


@pytest.mark.parametrize("direction", ["in", "out"])
def test_an_interrupted_conversion_goes_on_where_it_stopped(
    folders, direction, monkeypatch, tmp_path
):
    hf, ours = folders
    unit = "_write_chunks" if direction == "in" else "_write_piece"
    convert_unit, calls = getattr(hf_convert, unit), []
    target, expected = tmp_path / "out", ours if direction == "in" else hf

    def convert() -> None:
        if direction == "in":
            hf_to_checkpoint(HFFolder(hf), target, adapter(), **NAMES)
        else:
            options = {"dtype": torch.float32, "max_file_bytes": FILE_BYTES}
            checkpoint_to_hf(ours, target, adapter(), **options)

    def interrupted(*args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        return convert_unit(*args, **kwargs)

    monkeypatch.setattr(hf_convert, unit, interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert()
    assert not target.exists()

    def counting(*args, **kwargs):
        again.append(args)
        return convert_unit(*args, **kwargs)

    again: list = []
    monkeypatch.setattr(hf_convert, unit, counting)
    convert()
    total = len(list(hf.glob("*.safetensors"))) if direction == "in" else len(adapter().pieces())
    assert 0 < len(again) <= total - 3 + 1  # at most the one that was being converted again
    assert bytes_of(target) == bytes_of(expected)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_torn_line_of_the_journal_costs_one_unit(tmp_path):
    progress = ConversionProgress(tmp_path / "out.tmp", {"a": 1})
    progress.add("first", [1])
    progress.add("second")
    progress.path.write_text(progress.path.read_text()[:-3])
    again = ConversionProgress(tmp_path / "out.tmp", {"a": 1})
    assert again.continues and again.done == {"first": [1]}
    again.add("third")
    assert ConversionProgress(tmp_path / "out.tmp", {"a": 1}).done.keys() == {"first", "third"}


def test_what_another_conversion_left_is_not_gone_on_with(folders, monkeypatch, tmp_path):
    hf, ours = folders
    stopped = []

    def stop_at_third(*args, **kwargs):
        stopped.append(args)
        if len(stopped) == 3:
            raise KeyboardInterrupt
        return write_piece(*args, **kwargs)

    write_piece = hf_convert._write_piece
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(hf_convert, "_write_piece", stop_at_third)
        checkpoint_to_hf(ours, tmp_path / "out", adapter(), dtype=torch.bfloat16)
    options = {"dtype": torch.float32, "max_file_bytes": FILE_BYTES}
    checkpoint_to_hf(ours, tmp_path / "out", adapter(), **options)
    assert bytes_of(tmp_path / "out") == bytes_of(hf)


def test_a_tensor_that_was_saved_in_parts_is_put_together(folders, tmp_path):
    """Ranks of a sharded run leave parts of rows and columns, which make one tensor."""
    stored = hf_convert.StoredTensors(folders[1])
    expected = load_file(next(folders[0].glob("model-00001*")))["model.embed_tokens.weight"]
    part = stored.read("tok_embeddings.weight", ((3, 2), (5, 4)))
    assert torch.equal(part, expected[3:8, 2:6])
    experts = stored.read("layers.1.moe.experts.w1", ((1, 2, 3), (2, 4, 5)))
    whole = stored.read("layers.1.moe.experts.w1")
    assert whole.shape == (4, 8, 16) and torch.equal(experts, whole[1:3, 2:6, 3:8])


def test_multi_token_prediction_comes_along_where_it_is_asked_for(tmp_path):
    args = dataclasses.replace(ARGS, n_mtp_layers=1)
    model, with_it = DeepSeekV3Model(args), DeepSeekV3StateDictAdapter(args)
    model.init_weights()
    save_hf(model, with_it, tmp_path / "hf", dtype=torch.float32)
    convert = script("checkpoint_conversion/convert_from_hf.py")
    folders = [str(tmp_path / "hf"), str(tmp_path / "ours")]
    assert convert.main([*folders, "--model_arg", "n_mtp_layers=1"]) == 0
    options = {"dtype": torch.float32}
    checkpoint_to_hf(tmp_path / "ours", tmp_path / "again", with_it, **options)
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "hf")
    for wrong in ("n_mtp_layers", "n_mtp_layers=x", "moe_args.top=1"):
        assert convert.main([folders[0], str(tmp_path / "no"), "--model_arg", wrong]) == 2


# ---------------------------------------------------------------------------------------------
# Refused by name, nothing half-written
# ---------------------------------------------------------------------------------------------


def changed(hf: Path, folder: Path, change) -> Path:
    tensors = {n: t for file in hf.glob("*.safetensors") for n, t in load_file(file).items()}
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def refusal(folder: Path, target: Path) -> str:
    with pytest.raises(UserError) as caught:
        hf_to_checkpoint(HFFolder(folder), target, adapter(), **NAMES)
    assert not target.exists() and not list(target.parent.glob("*.tmp"))
    return str(caught.value)


def test_missing_and_surplus_tensors_are_all_listed(folders, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        tensors["model.layers.0.mlp.wi.weight"] = torch.zeros(1)

    folder = changed(folders[0], tmp_path / "hf", change)
    assert refusal(folder, tmp_path / "out") == (
        f"{folder} does not hold this model: it lacks model.layers.1.mlp.experts.2.up_proj.weight; "
        "model.norm.weight, and also has model.layers.0.mlp.wi.weight. Choose the "
        "model.flavor and model.args that its config.json describes."
    )


def test_other_shapes_are_listed(folders, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = torch.zeros(65, 16)
        tensors["model.layers.2.mlp.gate.e_score_correction_bias"] = torch.zeros(5)

    message = refusal(changed(folders[0], tmp_path / "hf", change), tmp_path / "out")
    assert "lm_head.weight 65 x 16 instead of 64 x 16" in message
    assert "model.layers.2.mlp.gate.e_score_correction_bias 5 instead of 4" in message


def test_the_multi_token_prediction_layer_is_left_out_with_a_line(folders, tmp_path, caplog):
    def change(tensors):
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(1)
        tensors["model.layers.3.mlp.experts.0.up_proj.weight"] = torch.zeros(1)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    folder = changed(folders[0], tmp_path / "hf", change)
    with caplog.at_level("INFO"):
        load_hf(DeepSeekV3Model(ARGS), adapter(), folder)
    assert "2 tensors left out (multi-token prediction" in caplog.text
    assert "1 tensors left out (rotary frequencies" in caplog.text


def test_a_damaged_file_is_named(folders, tmp_path):
    folder = changed(folders[0], tmp_path / "hf", lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^.*model.safetensors can't be read \(.*download it"):
        HFFolder(folder)


def test_files_of_the_index_that_are_missing_are_named(folders, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(UserError, match="model-1.safetensors, model-2.safetensors; download"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("content", ['{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_an_index_without_a_table_of_files_is_told(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError):
        HFFolder(tmp_path)


def test_a_tensor_that_its_file_lacks_is_named(folders, tmp_path):
    folder = changed(folders[0], tmp_path / "hf", lambda tensors: tensors.pop("model.norm.weight"))
    index = json.loads((folders[0] / "model.safetensors.index.json").read_text())
    weight_map = dict.fromkeys(index["weight_map"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder, tmp_path / "out")
    assert (
        "model.safetensors lacks model.norm.weight, which model.safetensors.index.json" in message
    )


def test_fp8_weights_without_their_scales_are_named(folders, tmp_path):
    """Read without them they would be numbers of another size."""
    checkpoint_to_hf(folders[1], tmp_path / "fp8", adapter(), dtype=torch.bfloat16, fp8=True)

    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
        tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"] = torch.ones(2, 1)

    message = refusal(changed(tmp_path / "fp8", tmp_path / "hf", change), tmp_path / "out")
    assert "it lacks model.layers.0.mlp.up_proj.weight_scale_inv, and has in other" in message
    assert "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv 2 x 1 instead of 1 x 1" in message


def test_a_disk_that_fails_is_told_in_a_sentence(folders, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_convert, "_write_chunks", full)
    with pytest.raises(UserError, match="out could not be made .*No space left.*resumes where it"):
        hf_to_checkpoint(HFFolder(folders[0]), tmp_path / "out", adapter(), **NAMES)
    monkeypatch.undo()
    hf_to_checkpoint(HFFolder(folders[0]), tmp_path / "out", adapter(), **NAMES)
    assert damage(tmp_path / "out") is None


def test_a_damaged_checkpoint_makes_no_folder(folders, tmp_path):
    copy = tmp_path / "ours"
    copy.mkdir()
    for file in folders[1].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "__0_1.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "__0_1.distcp").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"is damaged: __0_1.distcp does not have the bytes"):
        checkpoint_to_hf(copy, tmp_path / "out", adapter(), dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_target_that_exists_is_left_alone(folders, tmp_path):
    with pytest.raises(UserError, match="already exists"):
        hf_to_checkpoint(HFFolder(folders[0]), tmp_path, adapter(), **NAMES)


def test_a_target_inside_of_its_source_is_refused(folders):
    with pytest.raises(UserError, match="lies inside of"):
        checkpoint_to_hf(folders[1], folders[1] / "hf", adapter(), dtype=torch.float32)
    with pytest.raises(UserError, match="lies inside of"):
        hf_to_checkpoint(HFFolder(folders[0]), Path(folders[0]) / "out", adapter(), **NAMES)


def test_what_hugging_face_cannot_compute_is_refused_first(folders, tmp_path):
    moe = dataclasses.replace(ARGS.moe_args, score_before_experts=True)
    other = DeepSeekV3StateDictAdapter(dataclasses.replace(ARGS, moe_args=moe))
    with pytest.raises(UserError, match="moe_args.score_before_experts = True it is not a DeepSee"):
        checkpoint_to_hf(folders[1], tmp_path / "out", other, dtype=torch.float32)


def test_files_are_laid_out_as_safetensors_lays_them_out(tmp_path):
    """Byte for byte: types by width, names in order, header padded to 8 bytes."""
    model = DeepSeekV3Model(ARGS)
    model.init_weights()
    save_hf(model, adapter(), tmp_path / "ours", dtype=torch.bfloat16)
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_layout_fills_files_to_the_limit_and_no_further():
    layout = plan_layout(adapter().pieces(), torch.float32, max_file_bytes=FILE_BYTES)
    data = {f: layout.sizes[f] - len(layout.headers[f]) for f in layout.headers}
    largest = max(torch.Size(place.shape).numel() * 4 for place in layout.places.values())
    assert len(data) > 5 and all(size <= FILE_BYTES for size in data.values())
    assert all(size > FILE_BYTES - largest for size in list(data.values())[:-1])


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------

_MEASURE = """
import sys, torch
from pathlib import Path
from torchtitan.components.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.models.deepseek_v3 import DeepSeekV3StateDictAdapter

def memory(kind):  # KiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1])

def peak_of(convert):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    convert()
    return (memory("VmHWM") - before) * 1024

base = Path(sys.argv[1])
source = HFFolder(base / "hf")
adapter = DeepSeekV3StateDictAdapter(DeepSeekV3StateDictAdapter.args_of(source.config))
torch.set_num_threads(1)
print(peak_of(lambda: hf_to_checkpoint(
    source, base / "ours", adapter, model="deepseek_v3", flavor="toy")))
for fp8 in (False, True):
    print(peak_of(lambda: checkpoint_to_hf(
        base / "ours", base / f"out{fp8}", adapter, dtype=torch.float32, fp8=fp8,
        max_file_bytes=int(sys.argv[2]))))
"""


def test_a_conversion_needs_less_memory_than_two_files(tmp_path, monkeypatch):
    sizes = {"vocab_size": 512, "dim": 256, "inter_dim": 1024, "moe_inter_dim": 256}
    moe_args = dataclasses.replace(ARGS.moe_args, num_experts=28)
    args = dataclasses.replace(ARGS, n_layers=12, moe_args=moe_args, **sizes)
    model = DeepSeekV3Model(args)
    model.init_weights()
    per_layer = 3 * 28 * 256 * 256 * 4
    small_files = partial(plan_layout, max_file_bytes=per_layer)
    monkeypatch.setattr(load_save, "plan_layout", small_files)
    save_hf(model, DeepSeekV3StateDictAdapter(args), tmp_path / "hf", dtype=torch.float32)
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) >= 10
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), str(per_layer)],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    largest = max(file.stat().st_size for file in files)
    peaks = [int(line) for line in out.stdout.split()]
    assert len(peaks) == 3
    assert all(0 < peak < 2 * largest for peak in peaks), (peaks, largest)
