"""Phases of a run: by hand, the report's recipe, and in the middle of a real run."""

import logging
from pathlib import Path

import pytest

from tests.tiny_run import as_option, losses, records, tiny
from torchtitan.config import ConfigManager, JobConfig, Phase, validate
from torchtitan.config.phases import RunSchedule, StepSettings
from torchtitan.train import main


def schedule_of(*phases: Phase) -> RunSchedule:
    before = StepSettings(0, "", lr=1.0, batch_size=4, seq_len=8, local_batch_size=2)
    return RunSchedule(phases, before)


def test_values_by_hand():
    schedule = schedule_of(
        Phase(name="up", tokens=100, lr=3.0, lr_shape="linear"),
        Phase(tokens=100, load_balance_coeff=0.5),
        Phase(tokens=100, lr=1.0, lr_shape="cosine", batch_size=12, mtp_loss_weight=0.1),
        Phase(tokens=100, lr=0.25),
    )
    seen = [(now.phase, now.lr, now.batch_size) for now in map(schedule.at, range(0, 501, 50))]
    assert seen == [
        (1, 1.0, 4),
        (1, 2.0, 4),
        (2, 3.0, 4),
        (2, 3.0, 4),
        (3, 3.0, 12),
        (3, pytest.approx(2.0), 12),
        (4, 0.25, 12),
        (4, 0.25, 12),
        (4, 0.25, 12),  # and so it stays
        (4, 0.25, 12),
        (4, 0.25, 12),
    ]
    assert schedule.at(275).lr == pytest.approx(1 + 2 * 0.5 * (1 - 2**-0.5))
    assert schedule.at(99).coefficients == {}
    assert schedule.at(199).coefficients == {"load_balance_coeff": 0.5}
    assert schedule.at(299).coefficients == {"load_balance_coeff": 0.5, "mtp_loss_weight": 0.1}


def test_the_batch_climbs_stairs_that_share_the_phase_evenly():
    stairs = {"batch_size_shape": "linear", "batch_size_step": 4}
    schedule = schedule_of(
        Phase(tokens=90, batch_size=12, **stairs), Phase(tokens=60, batch_size=8, **stairs)
    )
    sizes = [schedule.at(tokens).batch_size for tokens in (0, 29, 30, 59, 60, 89, 90, 119, 120)]
    assert sizes == [4, 4, 8, 8, 12, 12, 12, 12, 8]


def test_steps_are_counted_without_walking_through_them():
    stairs = {"batch_size_shape": "linear", "batch_size_step": 4}
    schedule = schedule_of(
        Phase(tokens=1000),
        Phase(tokens=777, batch_size=16, **stairs),
        Phase(tokens=9, batch_size=8, seq_len=32),
        Phase(tokens=11, seq_len=10),  # the step of 256 tokens before it goes over its end
        Phase(tokens=5000, batch_size=6),
    )
    tokens = steps = sequences = 0
    firsts, ends = {}, [0, 1000, 1777, 1786, 1797]
    while tokens < schedule.tokens:
        now = schedule.at(tokens)
        for _ in range(now.batch_size):
            for phase, end in enumerate(ends):
                if tokens >= end:
                    firsts.setdefault(phase, sequences)
            tokens += now.seq_len
            sequences += 1
        steps += 1
    assert schedule.num_steps() == steps
    assert schedule.first_sequences() == list(firsts.values())


# ---------------------------------------------------------------------------------------------
# The published recipe
# ---------------------------------------------------------------------------------------------


def published() -> tuple[RunSchedule, JobConfig]:
    file = Path("train_configs/deepseek_v3_671b.toml")
    config = ConfigManager().parse_args([f"--job.config_file={file}"])
    validate(config, world_size=1024)
    return RunSchedule.of(config, config.training.global_batch_size), config


@pytest.mark.parametrize(
    "tokens, lr, batch_size, coefficients",
    [
        (0, 2.2e-4, 3072, (0.001, 0.3)),
        (470e9, 2.2e-4, 15360, (0.001, 0.3)),
        (9.99e12, 2.2e-4, 15360, (0.001, 0.3)),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2, 15360, (0.001, 0.1)),  # half of the cosine
        (14.2999999e12, 2.2e-5, 15360, (0.001, 0.1)),
        (14.31e12, 2.2e-5, 15360, (0.0, 0.1)),
        (14.7e12, 7.3e-6, 15360, (0.0, 0.1)),
    ],
)
def test_671b_is_the_report(tokens, lr, batch_size, coefficients):
    schedule, config = published()
    now = schedule.at(int(tokens))
    assert now.lr == pytest.approx(lr, rel=1e-6) and now.batch_size == batch_size
    start = {**config.model.args, **config.model.args["moe_args"]}
    values = {**start, **now.coefficients}
    assert (values["load_balance_coeff"], values["mtp_loss_weight"]) == coefficients
    assert values["sequence_balance_coeff"] == 1e-4


def test_671b_ends_with_its_phases_after_14_8_trillion_tokens():
    schedule, config = published()
    assert schedule.tokens == 14.8e12
    assert schedule.num_steps() == config.training.steps


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------

# Sequences of 32 tokens: 4 of them are 128 tokens.
PHASES = [
    {"name": "warm", "tokens": 256, "lr": 1e-2, "load_balance_coeff": 0.01},
    {"tokens": 512, "lr": 2e-3, "lr_shape": "linear", "batch_size": 8},
    {"tokens": 256, "load_balance_coeff": 0},
]


def test_a_run_follows_its_phases(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="torchtitan")
    assert main([*tiny(tmp_path, training__steps=5), as_option(PHASES)]) == 0
    seen = records(tmp_path)
    assert [r["phase"] for r in seen] == [1, 1, 2, 2, 3]
    assert [r["batch_size"] for r in seen] == [4, 4, 8, 8, 8]
    assert [r["tokens_seen"] for r in seen] == [128, 256, 512, 768, 1024]
    assert [r["lr"] for r in seen] == pytest.approx([1e-2, 1e-2, 1e-2, 6e-3, 2e-3])
    assert [r["load_balance_coeff"] for r in seen] == [0.01, 0.01, 0.01, 0.01, 0]


def test_a_phase_goes_on_in_its_middle_with_the_same_bits(tmp_path):
    options = ["--checkpoint.enable", "--checkpoint.last_save_model_only=false"]
    options.append(as_option(PHASES))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*tiny(whole, training__steps=5), *options]) == 0
    assert main([*tiny(parts, training__steps=3), *options]) == 0
    assert main([*tiny(parts, training__steps=5), *options]) == 0
    assert losses(parts)[-2:] == losses(whole)[-2:]
    assert [r["lr"] for r in records(parts)][-2:] == [r["lr"] for r in records(whole)][-2:]


def test_a_phase_turns_the_z_loss_on(tmp_path):
    """The first step of a run is the same with it, and what the router learns from there is not."""
    phases = [{"tokens": 128}, {"tokens": 384, "z_loss_coeff": 0.5}]
    plain = [phases[0], {"tokens": 384}]
    for folder, rows in ((tmp_path / "with", phases), (tmp_path / "without", plain)):
        assert main([*tiny(folder, training__steps=3), as_option(rows)]) == 0
    with_z, without = records(tmp_path / "with"), records(tmp_path / "without")
    assert [r.get("z_loss_coeff") for r in with_z] == [None, 0.5, 0.5]
    assert all("z_loss_coeff" not in record for record in without)
    norms = [[r["grad_norm"] for r in run] for run in (with_z, without)]
    assert norms[0][0] == norms[1][0] and norms[0][1] != norms[1][1]


def test_coefficients_of_experts_need_experts(tmp_path, capsys):
    dense = "--model.args.n_dense_layers=2"
    rows = [{"tokens": 1e6, "z_loss_coeff": 0.001}]
    assert main([*tiny(tmp_path), dense, as_option(rows)]) == 2
    assert (
        "[[schedule.phase]] sets z_loss_coeff, which this model does not have"
        in capsys.readouterr().err
    )


def test_a_bias_speed_needs_a_bias(tmp_path, capsys):
    no_bias = "--model.args.moe_args.load_balance_coeff=none"
    assert main([*tiny(tmp_path), no_bias, as_option(PHASES)]) == 2
    assert "the model has no expert bias" in capsys.readouterr().err
