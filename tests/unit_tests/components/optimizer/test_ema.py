"""The average of the weights: the recurrence in fp64, new starts, rewinds, and what others get."""

import logging
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scripts.checkpoint_conversion import convert_to_hf
from tests.fault_tests.test_non_finite import poisoned_loss
from tests.tiny_run import tiny
from torchtitan.config import ConfigManager, validate
from torchtitan.tools.errors import UserError
from torchtitan.trainer import Trainer, forward_backward
from torchtitan.trainer.step_log import Interval

EMA = {"ema__enable": True, "ema__decay": 0.9}
SAVES = {"checkpoint__enable": True, "checkpoint__interval": 2, "training__steps": 6}
# Its exports take normalised weights only.
SAVES |= {"model__args.moe_args.route_norm": True}
WHOLE = SAVES | {"checkpoint__last_save_model_only": False}


def start(folder: Path, **changes) -> Trainer:
    return Trainer(ConfigManager().parse_args(tiny(folder, **EMA | changes)))


def trained(folder: Path, **changes) -> dict[str, Tensor]:
    with closing(start(folder, **changes)) as trainer:
        trainer.train()
        return trainer.average.tensors()


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("start_step", "interval"), [(0, 1), (3, 2)])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_it_is_the_recurrence_of_the_fp32_weights(tmp_path, start_step, interval, computed):
    """In bf16, compute copies lie beside the weights: the average is not theirs."""
    settings = {"ema__start_step": start_step, "ema__interval": interval}
    settings["training__mixed_precision_param"] = computed
    with closing(start(tmp_path, training__steps=6, **settings)) as trainer:

        def weights() -> dict[str, Tensor]:
            return {n: p.detach().double() for n, p in trainer.model.named_parameters()}

        history, batches = [weights()], iter(trainer.dataloader)
        for step in range(1, 7):
            trainer.step = step
            trainer.train_step(batches, Interval())
            history.append(weights())
        average = trainer.average.tensors()
    first = {0: 0, 3: 4}[start_step]
    expected, share = history[first], 0.9**interval
    for step in range(first + interval, 7, interval):
        now = history[step]
        expected = {n: share * e + (1 - share) * now[n] for n, e in expected.items()}
    assert average.keys() == expected.keys()
    for name, tensor in expected.items():
        assert average[name].dtype == torch.float32
        torch.testing.assert_close(average[name].double(), tensor, rtol=1e-6, atol=1e-8, msg=name)
    moved = history[6]["output.weight"] - average["output.weight"]
    assert moved.abs().max() > 1e-3, "an average of nothing would pass"


def test_a_run_in_two_parts_has_the_average_of_a_run_in_one(tmp_path):
    straight = trained(tmp_path / "straight", **WHOLE)
    (tmp_path / "parts/checkpoint").mkdir(parents=True)
    begun = tmp_path / "straight/checkpoint/step-2"
    begun.rename(tmp_path / "parts/checkpoint/step-2")
    assert_same_bits(trained(tmp_path / "parts", **WHOLE), straight)


def test_a_rewind_takes_the_average_back(tmp_path, monkeypatch):
    """Poison in step 4: what step 3 added is gone. The oracle passes over batches 3 and 4."""
    loss_fn = poisoned_loss("loss nan", at_call=4)
    monkeypatch.setattr(forward_backward, "build_loss", lambda *_, **__: loss_fn)
    rewound = trained(tmp_path / "a", **WHOLE, training__non_finite_loss="rewind")
    monkeypatch.undo()
    with closing(start(tmp_path / "b", **WHOLE)) as oracle:
        batches = iter(oracle.dataloader)
        for step in range(1, 7):
            if step == 3:
                next(batches), next(batches)
            oracle.step = step
            oracle.train_step(batches, Interval())
        assert_same_bits(rewound, oracle.average.tensors())


def test_a_checkpoint_without_an_average_begins_one_and_says_so(tmp_path, caplog):
    trained(tmp_path, **WHOLE, ema__start_step=100)
    with caplog.at_level(logging.WARNING), closing(start(tmp_path, **WHOLE)) as trainer:
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        assert trainer.step == 6
        assert_same_bits(trainer.average.tensors(), weights)
    assert "No average of the weights was loaded: it begins at the weights of step 6" in caplog.text


def test_the_last_checkpoint_gives_the_average_to_others(tmp_path):
    """It holds weights only, and both become Hugging Face folders."""
    with closing(start(tmp_path, **SAVES)) as trainer:
        trainer.train()
        average = trainer.average.tensors()["layers.1.moe.experts.w1"]
        weights = trainer.model.get_parameter("layers.1.moe.experts.w1").detach().clone()
        bias = trainer.moes[1].expert_bias.clone()
    last = str(tmp_path / "checkpoint/step-6")
    stored = {}
    for name, options in {"plain": [], "ema": ["--ema"]}.items():
        out = tmp_path / name
        assert convert_to_hf.main([last, str(out), "--dtype", "float32", *options]) == 0
        files = map(load_file, out.glob("*.safetensors"))
        stored[name] = {key: tensor for file in files for key, tensor in file.items()}
    assert not torch.equal(average, weights) and bias.any()
    layer = "model.layers.1.mlp"
    for name, tensor in {"plain": weights, "ema": average}.items():
        assert torch.equal(stored[name][f"{layer}.experts.3.gate_proj.weight"], tensor[3])
        exported = stored[name][f"{layer}.gate.e_score_correction_bias"]
        torch.testing.assert_close(exported - exported.mean(), bias - bias.mean())


def test_there_must_be_an_average_to_give(tmp_path, capfd):
    trained(tmp_path, **WHOLE, ema__start_step=4)
    checkpoints = tmp_path / "checkpoint"
    for step, code in ((2, 2), (4, 0)):
        found = [str(checkpoints / f"step-{step}"), str(tmp_path / str(step)), "--ema"]
        assert convert_to_hf.main(found) == code, step
    assert "step-2 holds no average of the weights" in capfd.readouterr().err


def test_an_export_that_would_lose_it_is_refused(tmp_path):
    options = tiny(tmp_path, **EMA, checkpoint__enable=True, checkpoint__last_save_in_hf=True)
    with pytest.raises(UserError, match=r"their average \(ema.enable = true\) would be lost"):
        validate(ConfigManager().parse_args(options), 1)
