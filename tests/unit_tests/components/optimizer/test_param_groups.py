"""Weight decay and learning rate by name: who gets which, and updates as written out by hand."""

import logging
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_run import tiny
from tests.unit_tests.components.optimizer.test_optimizer import SETTINGS, Toy, written_out_adamw
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config import ConfigManager, ParamGroup
from torchtitan.train import main
from torchtitan.trainer import Trainer
from torchtitan.trainer.step_log import Interval

TABLES = [
    ParamGroup(match=["tok_embeddings.*", "norm.weight"], weight_decay=0.0, lr_factor=0.5),
    ParamGroup(match=["*.bias"], weight_decay=0.3),
    ParamGroup(match=["exp*", "norm.*"], lr_factor=2.0),
]
# By hand: decay and factor of each parameter of `Toy`.
EXPECTED = {
    "tok_embeddings.weight": (0.0, 0.5),
    "norm.weight": (0.0, 0.5),  # the first table holds
    "linear.bias": (0.3, 1.0),
    "experts": (0.1, 2.0),
    "linear.weight": (0.1, 1.0),
}
UPDATES = {
    "fused": {"implementation": "fused"},
    "foreach": {"implementation": "foreach"},
    "bf16 states": {"state_dtype": "bfloat16"},
    "Muon": {"name": "Muon"},
}


def trained(model: nn.Module, grads: dict[str, list[Tensor]], **settings) -> dict[str, Tensor]:
    optimizer = build_optimizer([model], **{**SETTINGS, **settings})
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for step in range(3):
        for name, p in params.items():
            p.grad = grads[name][step].clone()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("update", UPDATES)
def test_every_parameter_moves_as_its_table_says(update):
    """The oracle: an optimizer for each parameter alone, with its decay and rate as the only ones;
    and AdamW written out."""
    torch.manual_seed(0)
    start = Toy()
    grads = {n: [torch.randn_like(p) for _ in range(3)] for n, p in start.named_parameters()}
    model = Toy()
    model.load_state_dict(start.state_dict())
    ours = trained(model, grads, group=TABLES, **UPDATES[update])
    assert ours.keys() == EXPECTED.keys()
    for name, (decay, factor) in EXPECTED.items():
        alone = Toy()
        alone.load_state_dict(start.state_dict())
        settings = {"lr": 0.02 * factor, "weight_decay": decay, "weight_decay_on": "all"}
        expected = trained(alone, grads, **UPDATES[update], **settings)[name]
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-8, msg=name)
        if "implementation" in UPDATES[update]:
            double = [grad.double() for grad in grads[name]]
            initial = start.get_parameter(name).detach().double()
            adam = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
            by_hand = written_out_adamw(
                initial, double, lr=0.02 * factor, weight_decay=decay, **adam
            )
            torch.testing.assert_close(ours[name].double(), by_hand, rtol=0, atol=1e-6, msg=name)


def test_groups_hold_every_parameter_once_and_the_first_has_the_rate_of_the_config():
    model = Toy()
    groups = build_optimizer([model], **SETTINGS, group=TABLES).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    assert groups[0]["lr"] == SETTINGS["lr"], "what the log shows"


def options(folder: Path, *tables: str, **changes) -> list[str]:
    return [*tiny(folder, **changes), f"--optimizer.group=[{', '.join(tables)}]"]


NORMS = '{match = ["*norm.weight"], weight_decay = 0.2, lr_factor = 0.1}'
EXPERTS = '{match = ["*.experts.w?"], weight_decay = 0.0}'


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_says_its_groups_and_scales_their_rates_with_the_schedule(
    tmp_path, caplog, precision
):
    told = options(
        tmp_path,
        NORMS,
        EXPERTS,
        lr_scheduler__warmup_steps=4,
        training__mixed_precision_param=precision,
    )
    with caplog.at_level(logging.INFO):
        trainer = Trainer(ConfigManager().parse_args(told))
    with closing(trainer):
        names = {p: name for name, p in trainer.model.named_parameters()}
        trainer.step = 1
        result = trainer.train_step(iter(trainer.dataloader), Interval())
        assert result.lr == pytest.approx(1e-2 / 4)
        for group in trainer.optimizer.param_groups:
            for p in group["params"]:
                norm = fnmatchcase(names[p], "*norm.weight")
                expert = ".experts.w" in names[p]
                assert group["weight_decay"] == (0.2 if norm else 0.0 if expert else 0.1), names[p]
                assert group["lr"] == pytest.approx(1e-2 * (0.1 if norm else 1) * 2 / 4), names[p]
        elements = sum(p.numel() for p, name in names.items() if name.endswith("norm.weight"))
    line = f"Optimizer: {elements:,} parameters in 7 tensors (*norm.weight): weight decay 0.2"
    assert f"{line}, 0.1 x the learning rate" in caplog.text


SENTENCES = {
    '{match = ["*norms.weight"], weight_decay = 0.0}': (
        'optimizer.group 1: match "*norms.weight" matches no parameter of this model; did you mean'
    ),
    '{match = ["x"], weight_decay = 0.0}': "; write a whole name, such as 'layers.",
    f'{NORMS}, {{match = ["norm.*"], weight_decay = 0.0}}': (
        'optimizer.group 2: all parameters that match "norm.*" belong to an earlier table already'
    ),
    "{match = [], weight_decay = 0.0}": "optimizer.group 1: match = [] must name parameters",
    '{match = ["norm.*"]}': "optimizer.group 1 changes nothing",
    '{match = ["norm.*"], weight_decay = -1.0}': "weight_decay = -1.0 must be a finite number",
    '{match = ["norm.*"], lr_factor = 0.0}': "lr_factor = 0.0 must be a finite number above 0",
    "{weight_decay = 0.0}": "match is missing; each of these tables needs it",
}


@pytest.mark.parametrize("tables", SENTENCES)
def test_tables_that_cannot_be_are_refused_in_a_sentence(tmp_path, tables, capfd):
    assert main([*options(tmp_path, tables), "--job.check_config"]) == 2
    said = capfd.readouterr().err
    assert SENTENCES[tables] in said and "Traceback" not in said
