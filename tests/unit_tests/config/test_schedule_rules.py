"""[[schedule.phase]]: from file and command line, and what can't be, each in one sentence."""

import pytest

from tests.tiny_run import as_option
from torchtitan.config import ConfigManager, Phase, validate
from torchtitan.tools.errors import UserError

STAIRS = {"batch_size_shape": "linear", "batch_size_step": 8}


@pytest.mark.parametrize(
    "phase, sentence",
    [
        ({"tokens": 4}, "tokens = 4.0 must be a number of tokens, at least one sequence"),
        ({"tokens": 1e6, "lr": -1}, "lr = -1.0 must be a finite number, 0 or more"),
        ({"tokens": 1e6, "lr_shape": "linear"}, "set lr to the value at the end"),
        ({"tokens": 1e6, "batch_size": 12}, "multiple of 8, .*; set it to 8 or 16"),
        ({"tokens": 1e6, "batch_size": 24, **STAIRS, "batch_size_step": 4}, "multiple of 8"),
        (
            {"tokens": 1e6, "batch_size": 40, **STAIRS, "batch_size_step": 24},
            "must divide the difference",
        ),
        (
            {"tokens": 1e6, "batch_size": 40, "batch_size_shape": "linear"},
            "batch_size_step.*set it",
        ),
        ({"tokens": 1e6, "batch_size": 40, "batch_size_step": 8}, "leave it out"),
        ({"tokens": 1e6, "z_loss_coeff": -0.1}, "z_loss_coeff = -0.1 must be a finite number"),
        ({"tokens": 1e6, "mtp_loss_weight": -0.1}, "mtp_loss_weight = -0.1 must be"),
    ],
)
def test_a_phase_that_can_not_be_is_one_sentence(phase, sentence):
    options = ["--training.local_batch_size=4", as_option([{"tokens": 1e6}, phase])]
    config = ConfigManager().parse_args([*options, "--training.seq_len=32"])
    with pytest.raises(UserError, match=r"schedule\.phase 2.*" + sentence):
        validate(config, world_size=2)


def test_decay_and_phases_exclude_each_other():
    options = ["--lr_scheduler.decay_ratio=0.5", as_option([{"tokens": 1e6}])]
    with pytest.raises(UserError, match="lr_scheduler.decay_ratio = 0.5, but .* the phases set"):
        validate(ConfigManager().parse_args(options), world_size=1)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[[schedule.phase]]\ntokens = 1\nlearning_rate = 2", "phase 1: unknown key"),
        ("[[schedule.phase]]\nlr = 1", "phase 1: tokens is missing"),
        ("[[schedule.phase]]\ntokens = 'x'", 'phase 1: tokens = "x" must be a number'),
        ("[schedule]\nphase = 3", "must be a list of tables, for example"),
    ],
)
def test_a_wrong_table_is_one_sentence(toml, text, sentence):
    with pytest.raises(UserError, match=sentence):
        ConfigManager().parse_args([toml(text)])


def test_the_command_line_takes_phases_and_says_what_is_wrong_in_them():
    parse = ConfigManager().parse_args
    config = parse(["--schedule.phase=[{tokens = 5, name = 'a'}, {tokens = 1e9}]"])
    assert config.schedule.phase == [Phase(name="a", tokens=5.0), Phase(tokens=1e9)]
    with pytest.raises(UserError, match="--schedule.phase 1: unknown key 'token'; did you mean"):
        parse(["--schedule.phase=[{token = 5}]"])
    with pytest.raises(UserError, match="--schedule.phase 3 must be a list of tables"):
        parse(["--schedule.phase=3"])
