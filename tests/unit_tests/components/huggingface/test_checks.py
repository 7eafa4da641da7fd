"""Hugging Face folders: biases any reader can use, copies for prediction layers, reasons first."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit_tests.components.checkpoint.test_convert import ARGS, NAMES
from torchtitan.components.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from torchtitan.components.huggingface import checks as hf_checks
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3StateDictAdapter
from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs, Qwen3StateDictAdapter
from torchtitan.tools.errors import UserError

BIAS, FILE = "mlp.gate.e_score_correction_bias", "model-00001-of-00001.safetensors"
MTP = dataclasses.replace(ARGS, n_mtp_layers=2)  # layers 3 and 4, behind 0 to 2
COPIES = {
    f"model.layers.{n}.{copy}.weight": original
    for n in (3, 4)
    for copy, original in (
        ("embed_tokens", "model.embed_tokens.weight"),
        ("shared_head.head", "lm_head.weight"),
    )
}


def build(args) -> DeepSeekV3Model:
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    return model


def export(model: DeepSeekV3Model, folder: Path) -> Path:
    save_hf(model, DeepSeekV3StateDictAdapter(model.model_args), folder, dtype=torch.float32)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    """With other tensors in its one file (None: without it), and no index."""
    held = tensors_of(folder) | tensors
    save_file({n: t for n, t in held.items() if t is not None}, folder / FILE)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


def set_config(folder: Path, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


# ---------------------------------------------------------------------------------------------
# The bias
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [7.0, -3.0])
def test_no_written_bias_is_negative_on_any_path(offset, tmp_path):
    """In the run's export, in conversions, and of a model that came from a folder."""
    model = build(MTP)
    biases = {n: b for n, b in model.named_buffers() if n.endswith("expert_bias")}
    for bias in biases.values():
        bias.normal_(std=0.3).add_(offset)
    adapter, folder = DeepSeekV3StateDictAdapter(MTP), export(model, tmp_path / "hf")
    hf_to_checkpoint(HFFolder(folder), tmp_path / "ours", adapter, **NAMES)
    options = {"dtype": torch.bfloat16}
    checkpoint_to_hf(tmp_path / "ours", tmp_path / "bf16", adapter, **options)
    checkpoint_to_hf(tmp_path / "ours", tmp_path / "fp8", adapter, fp8=True, **options)
    again = build(MTP)
    load_hf(again, adapter, folder)
    export(again, tmp_path / "again")
    for name in ("hf", "bf16", "fp8", "again"):
        written = {n: t for n, t in tensors_of(tmp_path / name).items() if n.endswith(BIAS)}
        assert len(written) == len(biases) == 4  # that of dense layer 0 doesn't exist
        for bias, tensor in zip(biases.values(), written.values(), strict=True):
            assert tensor.dtype == torch.float32 and tensor.min() == 0
            assert torch.equal(tensor, (bias.double() - bias.double().min()).float())


def test_a_checkpoint_of_a_trained_model_has_its_bias_shifted_on_the_way_out(tmp_path):
    """One of DeepSeek's own offset in a checkpoint: the conversion writes it, not the run."""
    folder = export(build(ARGS), tmp_path / "hf")
    name = f"model.layers.1.{BIAS}"
    changed(folder, **{name: 7 + torch.tensor([0.5, -1.0, 0.25, 0.0])})
    adapter = DeepSeekV3StateDictAdapter(ARGS)
    hf_to_checkpoint(HFFolder(folder), tmp_path / "ours", adapter, **NAMES)
    checkpoint_to_hf(tmp_path / "ours", tmp_path / "out", adapter, dtype=torch.float32)
    assert tensors_of(tmp_path / "out")[name].tolist() == [1.5, 0.0, 1.25, 1.0]


# ---------------------------------------------------------------------------------------------
# Copies in the layers of multi-token prediction
# ---------------------------------------------------------------------------------------------


def test_every_prediction_layer_gets_its_copies(tmp_path):
    adapter, folder = DeepSeekV3StateDictAdapter(MTP), export(build(MTP), tmp_path / "hf")
    hf_to_checkpoint(HFFolder(folder), tmp_path / "ours", adapter, **NAMES)
    options = {"dtype": torch.float32, "max_file_bytes": 6000}
    checkpoint_to_hf(tmp_path / "ours", tmp_path / "files", adapter, **options)
    for path in (folder, tmp_path / "files"):
        tensors = tensors_of(path)
        for copy, original in COPIES.items():
            assert torch.equal(tensors[copy], tensors[original])
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    exported = adapter.to_hf(build(MTP).state_dict())
    assert exported.keys() == tensors.keys()
    save_file(exported, tmp_path / "to_hf")  # which refuses shared memory


def in_and_out(folder: Path, tmp_path: Path, args=MTP) -> None:
    """Every way in."""
    adapter = DeepSeekV3StateDictAdapter(args)
    load_hf(build(args), adapter, folder)
    hf_to_checkpoint(HFFolder(folder), tmp_path / "ours", adapter, **NAMES)
    adapter.from_hf(tensors_of(folder))


def test_copies_that_agree_or_are_missing_give_no_warning(tmp_path, caplog):
    folder = export(build(MTP), tmp_path / "hf")
    in_and_out(folder, tmp_path / "a")
    in_and_out(changed(folder, **dict.fromkeys(COPIES)), tmp_path / "b")
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []


@pytest.mark.parametrize("name", list(COPIES)[1:3])
@pytest.mark.parametrize("copy", [torch.randn(64, 16), torch.zeros(64, 8)], ids=["values", "shape"])
def test_copies_that_differ_are_told_on_every_way_in(name, copy, tmp_path, caplog):
    folder = changed(export(build(MTP), tmp_path / "hf"), **{name: copy})
    in_and_out(folder, tmp_path / "a")
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 3
    assert all(f": {name} differs from the model's own" in sentence for sentence in told)


def test_one_different_row_is_seen_whoever_compares_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_checks, "_ROWS", 5)
    folder, name = export(build(MTP), tmp_path / "hf"), "model.layers.4.embed_tokens.weight"
    copy = tensors_of(folder)[name]
    copy[63] += 1
    folder, adapter = HFFolder(changed(folder, **{name: copy})), DeepSeekV3StateDictAdapter(MTP)
    found = [hf_checks.copies_that_differ(folder, adapter, reader=r, readers=3) for r in range(3)]
    assert found == [[name], [], []]  # the last of 13 parts is the first reader's
    assert hf_checks.copies_that_differ(folder, adapter) == [name]


def test_prediction_layers_that_are_missing_are_told_with_their_number(tmp_path):
    """The config.json promises more layers than the folder holds."""
    folder = export(build(dataclasses.replace(ARGS, n_mtp_layers=1)), tmp_path / "hf")
    set_config(folder, num_nextn_predict_layers=2)
    with pytest.raises(UserError) as caught:
        load_hf(build(MTP), DeepSeekV3StateDictAdapter(MTP), folder)
    assert str(caught.value) == (
        f"{folder} does not hold this model: it has 1 layers of multi-token prediction after its "
        "3 layers, but this model has 2: set model.args.n_mtp_layers to 1."
    )


# ---------------------------------------------------------------------------------------------
# Reasons before names
# ---------------------------------------------------------------------------------------------


def refusal(args, folder: Path) -> str:
    adapter = DeepSeekV3StateDictAdapter(args)
    with pytest.raises(UserError) as caught:
        load_hf(DeepSeekV3Model(args), adapter, folder)
    return str(caught.value)


def test_other_sizes_are_one_short_sentence_with_the_values_to_set(tmp_path):
    folder = export(build(ARGS), tmp_path / "hf")
    moe = dataclasses.replace(ARGS.moe_args, num_experts=8)
    other = dataclasses.replace(ARGS, n_layers=6, dim=32, moe_args=moe)
    assert refusal(other, folder) == (
        f"{folder}/config.json describes a model of other sizes: dim = 16 (the run has 32), "
        "n_layers = 3 (the run has 6), moe_args.num_experts = 4 (the run has 8); set these in "
        '[model.args], choose the model.flavor that has them ("from_hf" always does), or name the '
        "folder of this run's model."
    )


def test_without_a_config_long_lists_are_shortened(tmp_path):
    folder = export(build(ARGS), tmp_path / "hf")
    (folder / "config.json").unlink()
    for other in ({"n_layers": 9}, {"dim": 32}):
        sentence = refusal(dataclasses.replace(ARGS, **other), folder)
        assert len(sentence) < 800 and " others. Choose the model.flavor" in sentence


QWEN = Qwen3ModelArgs(
    vocab_size=96, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48
)


def test_tied_embeddings_are_refused_as_such(tmp_path):
    """By config.json; and by the missing head, where that is all there is."""
    model, adapter = Qwen3Model(QWEN), Qwen3StateDictAdapter(QWEN)
    model.init_weights()
    save_hf(model, adapter, tmp_path / "hf", dtype=torch.float32)
    changed(tmp_path / "hf", **{"lm_head.weight": None})
    set_config(tmp_path / "hf", tie_word_embeddings=True)
    for _ in range(2):
        with pytest.raises(UserError, match="tie_word_embeddings") as caught:
            load_hf(model, adapter, tmp_path / "hf")
        assert "lacks" not in str(caught.value)
        (tmp_path / "hf/config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "settings, change, sentence",
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"lm_head.weight": None, "lm_head.qweight": torch.zeros(8, 16)},
            "quantization_config.quant_method = 'gptq', but this architecture is supported only",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            {"lm_head.weight.absmax": torch.zeros(8)},
            "quant_method = 'bitsandbytes'",
        ),
        (
            {},
            {f"model.layers.{n}.{BIAS}": None for n in (1, 2)},
            'its experts have no bias; set model.args.moe_args.load_balance_coeff to "none"',
        ),
        ({"model_type": "qwen3"}, {"lm_head.weight": None}, "config.json has model_type = 'qwen3'"),
        ({"hidden_act": "gelu"}, {"lm_head.weight": None}, "config.json has hidden_act = 'gelu'"),
    ],
)
def test_the_reason_is_told_instead_of_the_names(settings, change, sentence, tmp_path):
    folder = changed(export(build(ARGS), tmp_path / "hf"), **change)
    set_config(folder, **settings)
    told = refusal(ARGS, folder)
    assert sentence in told and "lacks" not in told and "also has" not in told


def test_a_bias_without_a_place_is_told_with_its_key(tmp_path):
    folder = export(build(ARGS), tmp_path / "hf")
    moe = dataclasses.replace(ARGS.moe_args, load_balance_coeff=None)
    assert "experts have a bias; set model.args.moe_args.load_balance_coeff to 0 or more" in (
        refusal(dataclasses.replace(ARGS, moe_args=moe), folder)
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e5m2])
def test_weights_of_a_type_that_means_something_else_are_refused(tmp_path, dtype):
    model = build(ARGS)
    folder = export(model, tmp_path / "m")
    head = tensors_of(folder)["lm_head.weight"].to(dtype)
    changed(folder, **{"lm_head.weight": head})
    with pytest.raises(UserError, match="lm_head.weight"):
        load_hf(model, DeepSeekV3StateDictAdapter(ARGS), folder)
