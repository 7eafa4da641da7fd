"""What stands beside exported weights: transformers computes our logits from it and stops where
the tokenizer's text ends."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3MoeConfig

from tests.parity_tests.test_deepseek_hf import Case, batch, v3
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.data.tokenizer import DEFAULT_PATH, load_tokenizer
from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    DeepSeekV3ModelArgs,
    DeepSeekV3StateDictAdapter,
)
from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs, Qwen3StateDictAdapter

TOKENIZER = Path("tests/assets/tokenizer")
QWEN = Qwen3ModelArgs(
    vocab_size=96,
    max_seq_len=64,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    init_std=0.15,
)


def args_of(case: Case, **changes) -> DeepSeekV3ModelArgs:
    return type(case.args())(**vars(case.args()) | {"init_std": 0.15} | changes)


def model_of(args):
    torch.manual_seed(0)
    model = (DeepSeekV3Model if isinstance(args, DeepSeekV3ModelArgs) else Qwen3Model)(args)
    model.init_weights()
    return model.eval()


def export(model, folder: Path, **options) -> Path:
    args = model.model_args
    is_mla = isinstance(args, DeepSeekV3ModelArgs)
    adapter = (DeepSeekV3StateDictAdapter if is_mla else Qwen3StateDictAdapter)(args)
    save_hf(model, adapter, folder, dtype=torch.float32, **options)
    return folder


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def assert_same_logits(model, folder: Path) -> None:
    """In fp64, where the order of sums is no excuse."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **plain)
    expected = theirs.double().eval()(batch()).logits
    assert expected.std() > 0.1
    ours = copy.deepcopy(model).double()(batch())
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-6)


# ------------------------------------------------------------------ YaRN


@pytest.mark.parametrize(
    "numbers",
    [
        {"mscale": 0.0},
        {"attention_factor": 1.5},
        {"mscale": 0.0, "attention_factor": 1.3},
        {"mscale": 0.7, "attention_factor": 0.8, "yarn_truncate": False},
        {"beta_fast": 2.0, "beta_slow": 3.0},  # a ramp that falls
        {"original_seq_len": 2, "rope_factor": 100.0},  # one before the first channel
        {"rope_factor": 1.0, "attention_factor": 1.2},
    ],
    ids=str,
)
def test_yarns_numbers_mean_the_same_to_transformers_and_come_back(numbers, tmp_path):
    args = args_of(v3(yarn=True), **numbers)
    model = model_of(args)
    folder = export(model, tmp_path / "hf")
    assert_same_logits(model, folder)
    back = DeepSeekV3StateDictAdapter.args_of(read(folder / "config.json"))
    for name in args.yarn_numbers:
        assert getattr(back, name) == getattr(args, name), name


def test_readers_that_divide_the_lengths_or_the_magnitudes_find_our_numbers(tmp_path):
    """transformers 4.5x: the quotient of the lengths is the factor. vLLM: the quotient of the
    magnitudes is attention_factor."""
    args = args_of(v3(yarn=True), attention_factor=1.5, mscale=0.5)
    config = DeepSeekV3StateDictAdapter(args).hf_config()
    scaling = config["rope_scaling"]
    positions = config["max_position_embeddings"]
    assert positions == 1280 and type(positions) is int
    assert positions / scaling["original_max_position_embeddings"] == scaling["factor"]
    log = 0.1 * torch.tensor(40.0).double().log().item()
    quotient = (scaling["mscale"] * log + 1) / (scaling["mscale_all_dim"] * log + 1)
    assert quotient == pytest.approx(1.5)


def test_their_attention_factor_is_ours(tmp_path):
    """A published folder that has one, and a range that is not rounded."""
    theirs = v3(yarn=True).hf_model()
    theirs.config.rope_parameters |= {"attention_factor": 1.5, "truncate": False}
    theirs.save_pretrained(tmp_path)
    args = DeepSeekV3StateDictAdapter.args_of(read(tmp_path / "config.json"))
    model = DeepSeekV3Model(args)
    load_hf(model, DeepSeekV3StateDictAdapter(args), tmp_path)
    assert_same_logits(model, tmp_path)


# ------------------------------------------------------------------ lengths


def test_a_shorter_run_does_not_shorten_the_model():
    for args, positions in [
        (args_of(v3(yarn=False), max_seq_len=16, context_len=64), 64),
        (args_of(v3(yarn=False), max_seq_len=128, context_len=64), 128),
        (args_of(v3(yarn=True), max_seq_len=16), 1280),
    ]:
        config = DeepSeekV3StateDictAdapter(args).hf_config()
        assert config["max_position_embeddings"] == positions


# ------------------------------------------------------------------ the assets' config.json


@pytest.mark.parametrize(
    "theirs",
    [
        Qwen3Config(num_hidden_layers=5, eos_token_id=7, bos_token_id=3),
        Qwen3MoeConfig(num_hidden_layers=5, mlp_only_layers=[4], eos_token_id=7, bos_token_id=3),
        v3(yarn=True).hf_model().config,
    ],
    ids=["layer_types", "experts", "another family"],
)
def test_of_a_foreign_config_only_ids_are_taken(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    stale = {
        "auto_map": {"AutoModel": "modeling_x.X"},
        "quantization_config": {"quant_method": "awq"},
        "num_local_experts": 3,
        "partial_rotary_factor": 0.5,
        "eos_token_id": [7, 95, 4096],
    }
    config = read(tmp_path / "config.json") | stale
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = model_of(QWEN)
    folder = export(model, tmp_path / "hf", assets_path=tmp_path)
    ours = read(folder / "config.json")
    ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": [7, 95], "pad_token_id": None}
    extra = {"torch_dtype": "float32", **ids}
    assert ours == Qwen3StateDictAdapter(QWEN).hf_config() | extra
    assert_same_logits(model, folder)


# ------------------------------------------------------------------ tokens


@pytest.fixture
def assets(tmp_path) -> Path:
    """The shipped tokenizer, with token 37 as its end."""
    folder = tmp_path / "assets"
    shutil.copytree(TOKENIZER, folder)
    vocab = read(folder / "tokenizer.json")["model"]["vocab"]
    end = next(text for text, number in vocab.items() if number == 37)
    settings = read(folder / "tokenizer_config.json") | {"eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("named", ["the folder", "its file"])
def test_generate_stops_at_the_tokenizers_end(assets, tmp_path, named):
    args = args_of(v3(yarn=False), vocab_size=2048)
    model = model_of(args)
    path = assets if named == "the folder" else assets / "tokenizer.json"
    folder = export(model, tmp_path / "hf", assets_path=path)
    assert read(folder / "config.json")["eos_token_id"] == 37
    assert read(folder / "generation_config.json")["eos_token_id"] == 37
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # the end is the likeliest token
        theirs.lm_head.weight.zero_()
        theirs.lm_head.weight[37] = theirs.model.norm.weight.new_tensor(1.0)
        theirs.model.embed_tokens.weight.fill_(1.0)
    text = theirs.generate(torch.tensor([[5, 6]]), max_new_tokens=8, do_sample=False)
    assert text[0].tolist() == [5, 6, 37]


def test_further_ends_and_sampling_stay_and_the_rest_goes(assets, tmp_path):
    settings = {
        "eos_token_id": [37, 11, 999_999],
        "pad_token_id": 5,
        "temperature": 0.6,
        "do_sample": True,
        "transformers_version": "4.33.1",
        "_from_model_config": True,
        "cache_implementation": "hybrid",
    }
    (assets / "generation_config.json").write_text(json.dumps(settings))
    model = model_of(args_of(v3(yarn=False), vocab_size=2048))
    folder = export(model, tmp_path / "hf", assets_path=assets)
    assert read(folder / "generation_config.json") == {
        "temperature": 0.6,
        "do_sample": True,
        "bos_token_id": 0,
        "eos_token_id": [37, 11],
        "pad_token_id": 2,
    }


@pytest.mark.parametrize("says", [None, False])
def test_texts_begin_for_transformers_as_in_training(tmp_path, says):
    """The shipped folder doesn't say how texts begin; one that does is left alone."""
    source = Path(shutil.copytree(DEFAULT_PATH, tmp_path / "assets"))
    if says is not None:
        file = source / "tokenizer_config.json"
        file.write_text(json.dumps(read(file) | {"add_bos_token": says}))
    folder = export(model_of(args_of(v3(yarn=False))), tmp_path / "hf", assets_path=source)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(str(folder)).encode("Once upon", add_bos=says is None)
    assert theirs("Once upon")["input_ids"] == ours
    same = (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert same == (says is not None)


def test_without_a_tokenizer_no_class_default_stands_in(tmp_path):
    """DeepseekV3Config's own end is 1."""
    folder = export(model_of(args_of(v3(yarn=False))), tmp_path / "hf")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None,) * 3
    assert not (folder / "generation_config.json").exists()


# ------------------------------------------------------------------ told


def test_another_epsilon_in_the_latents_norms_is_told_on_both_ways(tmp_path, caplog):
    told = "the norms of MLA's latents (q_norm, kv_norm) have rms_norm_eps (1e-05)"
    args = args_of(v3(yarn=False), norm_eps=1e-5)
    folder = export(model_of(args), tmp_path / "hf")
    assert told in caplog.text
    caplog.clear()
    load_hf(model_of(args), DeepSeekV3StateDictAdapter(args), folder)
    assert told in caplog.text
    caplog.clear()
    export(model_of(args_of(v3(yarn=False))), tmp_path / "plain")
    assert "rms_norm_eps" not in caplog.text


def test_a_key_that_nothing_here_knows_is_named_when_weights_are_loaded(tmp_path, caplog):
    args = args_of(v3(yarn=False))
    folder = export(model_of(args), tmp_path / "hf")
    config = read(folder / "config.json") | {"some_new_key": 2, "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config))
    load_hf(model_of(args), DeepSeekV3StateDictAdapter(args), folder)
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert "some_new_key: unknown here" in warning
