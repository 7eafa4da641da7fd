"""The converters of FP8: what they convert, what they say, what they refuse."""

from pathlib import Path

import pytest
import torch

from tests.tiny_run import losses, tiny
from torchtitan.components.finetuning.trained import make_whole_model
from torchtitan.config import ConfigManager
from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.train import main
from torchtitan.trainer.preflight import check_config, model_args_of

FLOAT8 = {
    "model__converters": '["float8"]',
    "quantize__linear__float8__emulate": True,
    "model__args__moe_inter_dim": 128,
    "lr_scheduler__min_lr_factor": 1,
}


def converted(**changes) -> dict[str, Fp8Recipe]:
    config = ConfigManager().parse_args(tiny(Path("unused"), **FLOAT8 | changes))
    spec = get_train_spec(config.model.name)
    model = make_whole_model(spec, model_args_of(config, spec, 32), config)
    recipes = {name: getattr(module, "fp8", None) for name, module in model.named_modules()}
    return {name: recipe for name, recipe in recipes.items() if recipe is not None}


def test_attention_feed_forwards_and_experts_are_converted_and_nothing_else():
    assert set(converted(model__args__n_mtp_layers=1)) == {
        f"{block}.{layer}"
        for block, layers in {
            "layers.0": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            "layers.1": ("moe.experts", *(f"moe.shared_experts.w{i}" for i in (1, 2, 3))),
            "mtp.0.block": ("moe.experts", *(f"moe.shared_experts.w{i}" for i in (1, 2, 3))),
        }.items()
        for layer in (*layers, *(f"attention.{w}" for w in ("wq", "wkv_b", "wo")))
    }  # wkv_a has 40 outputs


def test_each_of_torchtitans_names_converts_its_half():
    linear = converted(model__converters='["quantize.linear.float8"]')
    assert not any("experts" in name and "shared" not in name for name in linear)
    experts = converted(
        model__converters='["quantize.grouped_mm.float8"]',
        quantize__grouped_mm__float8__fqns='["experts"]',
    )
    assert set(experts) == {"layers.1.moe.experts"}
    assert set(converted()) == set(linear) | set(experts)


def test_filtered_names_stay():
    left = converted(quantize__linear__float8__filter_fqns='["attention", "layers.0"]')
    assert set(left) == {
        "layers.1.moe.experts",
        *(f"layers.1.moe.shared_experts.w{i}" for i in (1, 2, 3)),
    }


def test_the_head_is_converted_where_asked_for_and_trains(tmp_path, capsys):
    asked = {"quantize__linear__float8__head": True}
    assert set(converted(**asked)) - set(converted()) == {"output"}
    others = converted(**asked, quantize__linear__float8__recipe_name="rowwise")
    assert others["output"] == Fp8Recipe(emulate=True)
    main(tiny(tmp_path / "without", **FLOAT8))
    capsys.readouterr()
    main(tiny(tmp_path / "with", **FLOAT8 | asked))
    assert "layers.*.moe.shared_experts.w3, output" in capsys.readouterr().err
    for ours, exact in zip(losses(tmp_path / "with"), losses(tmp_path / "without"), strict=True):
        assert ours != exact and ours == pytest.approx(exact, rel=0.02)


def test_gradients_take_the_format_that_the_key_names():
    assert set(converted().values()) == {Fp8Recipe(wide_gradients=False, emulate=True)}
    wide = converted(quantize__linear__float8__gradient_dtype="e5m2")
    assert set(wide.values()) == {Fp8Recipe(wide_gradients=True, emulate=True)}


@pytest.mark.parametrize("scales", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_other_scales_are_for_linear_layers_and_train(scales, tmp_path, capsys):
    named = {"quantize__linear__float8__recipe_name": scales}
    recipes = converted(**named)
    assert recipes.pop("layers.1.moe.experts") == Fp8Recipe(emulate=True)
    wide = scales == "tensorwise"
    assert set(recipes.values()) == {Fp8Recipe(wide, emulate=True, scales=scales)}
    narrow = converted(**named, quantize__linear__float8__gradient_dtype="e4m3")
    assert not any(recipe.wide_gradients for recipe in narrow.values())
    main(tiny(tmp_path / "plain", **FLOAT8 | {"model__converters": "[]"}))
    capsys.readouterr()
    main(tiny(tmp_path / "ours", **FLOAT8 | named))
    said = capsys.readouterr().err
    assert f"FP8 ({scales}, gradients {'e5m2' if wide else 'e4m3'}): layers.*.attention.wq" in said
    assert "FP8 (blockwise, gradients e4m3): layers.*.moe.experts" in said
    for ours, exact in zip(losses(tmp_path / "ours"), losses(tmp_path / "plain"), strict=True):
        assert ours != exact and ours == pytest.approx(exact, rel=0.02)


def test_a_run_trains_says_what_is_converted_and_goes_on_without_fp8(tmp_path, capsys):
    """The checkpoint holds the weights, whatever the precision."""
    whole, half, plain = (tmp_path / name for name in ("whole", "half", "plain"))
    main(tiny(plain, **FLOAT8 | {"model__converters": "[]"}))
    main(tiny(whole, **FLOAT8))
    said = capsys.readouterr().err
    assert "FP8 (blockwise, gradients e4m3): layers.*.attention.wq (2)" in said
    assert "Not in FP8 (40 is no multiple of 16): layers.*.attention.wkv_a (2)" in said
    assert "FP8 is emulated in plain torch" in said
    for ours, exact in zip(losses(whole), losses(plain), strict=True):
        assert ours != exact and ours == pytest.approx(exact, rel=0.02)
    saving = {"checkpoint__enable": True, "checkpoint__interval": 2, "training__steps": 2}
    saving["checkpoint__last_save_model_only"] = False
    main(tiny(half, **FLOAT8 | saving))
    main(tiny(half, **FLOAT8 | saving | {"training__steps": 4}))
    assert losses(half) == losses(whole)
    main(tiny(half, **FLOAT8 | saving | {"training__steps": 5, "model__converters": "[]"}))
    assert len(losses(half)) == 5


def test_adapters_train_beside_weights_in_fp8(tmp_path, capsys):
    """Adapters begin at zero, so the first loss is that of FP8 alone, to the bit."""
    plain, adapted = tmp_path / "plain", tmp_path / "adapted"
    both = FLOAT8 | {"model__converters": '["lora", "float8"]', "lora__rank": 4}
    main(tiny(plain, **FLOAT8 | {"training__steps": 1}))
    capsys.readouterr()
    main(tiny(adapted, **both))
    said = capsys.readouterr().err
    assert "FP8 (blockwise, gradients e4m3): layers.*.attention.wq (2)" in said and "LoRA:" in said
    assert losses(adapted)[0] == losses(plain)[0] and losses(adapted)[-1] < losses(adapted)[0]


REFUSED = {
    "a name that does not exist": (
        {"model__converters": '["float88"]'},
        "model.converters names \"float88\", which does not exist; did you mean 'float8'?",
    ),
    "MXFP8": ({"model__converters": '["quantize.linear.mx"]'}, "which is for Blackwell GPUs"),
    "gathers of other scales": (
        {
            "quantize__linear__float8__recipe_name": "rowwise",
            "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
        },
        'recipe_name = "rowwise" has none; set the one to false, or the other to "blockwise".',
    ),
    "all-gather from the host": (
        {
            "quantize__linear__float8__enable_fsdp_float8_all_gather": True,
            "training__enable_cpu_offload": True,
        },
        "but training.enable_cpu_offload = true keeps them on the host; set either to false.",
    ),
    "scales of a whole tensor": (
        {"quantize__linear__float8__precompute_float8_dynamic_scale_for_fsdp": True},
        "is for gathers with tensor-wise scales",
    ),
    "automatic filter": (
        {"quantize__linear__float8__filter_fqns": '["auto_filter_small_kn"]'},
        "name the modules that shall stay in bfloat16",
    ),
    "experts without a name": (
        {"model__converters": '["quantize.grouped_mm.float8"]'},
        'quantize.grouped_mm.float8.fqns is empty, so that nothing is converted; set it to ["exper',
    ),
    "dispatch without experts": (
        {
            "model__converters": '["quantize.linear.float8"]',
            "quantize__grouped_mm__float8__dispatch": True,
        },
        "converts no experts; add",
    ),
    "a filter that names nothing": (
        {"quantize__linear__float8__filter_fqns": '["atention"]'},
        'quantize.linear.float8.filter_fqns: "atention" is part of no module\'s name',
    ),
    "experts that don't exist": (
        {"quantize__grouped_mm__float8__fqns": '["expertz"]'},
        'quantize.grouped_mm.float8.fqns: "expertz" is part of no module\'s name',
    ),
    "nothing left": (
        {"quantize__linear__float8__filter_fqns": '["layers"]', "model__args__moe_inter_dim": 32},
        "converts no layer of this model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_mean_nothing_are_refused(name, tmp_path):
    changes, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        check_config(ConfigManager().parse_args(tiny(tmp_path, **FLOAT8 | changes)))
    assert message in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_machine_without_fp8_says_how_to_emulate(tmp_path):
    off = FLOAT8 | {"quantize__linear__float8__emulate": False}
    with pytest.raises(UserError, match="needs a Hopper GPU, but this run is on cpu; set quantize"):
        check_config(ConfigManager().parse_args(tiny(tmp_path, **off)))
