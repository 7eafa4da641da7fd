"""The debug model, made tiny, through the front door: it learns and leaves the files of a run."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny_run import losses, records, tiny
from torchtitan.train import main

STEPS = 12
TENSORBOARD = "--metrics.enable_tensorboard"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run that several tests look at."""
    folder = tmp_path_factory.mktemp("run")
    assert main([*tiny(folder, training__steps=STEPS), TENSORBOARD]) == 0
    return folder


def test_the_loss_falls(run):
    before, *_, after = losses(run)
    # ln(2048) = 7.62 is the loss of knowing nothing.
    assert before == pytest.approx(7.62, abs=0.1) and after < before - 0.3


def test_each_step_has_its_line_of_numbers(run):
    steps = records(run)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["tokens_seen"] == STEPS * 4 * 32
    for record in steps:
        assert record["grad_norm"] > 0 and record["tps"] > 0 and record["skipped_steps"] == 0
        assert list(record["layer_max_violation"]) == ["1"], "layer 0 is dense, layer 1 has experts"


def test_tensorboard_shows_the_same_numbers_and_the_expert_load(run):
    events = EventAccumulator(
        str(next((run / "tb").iterdir())), size_guidance={"scalars": 0}
    ).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss_metrics/global_avg_loss")]
    assert shown == [(n + 1, pytest.approx(loss)) for n, loss in enumerate(losses(run))]
    assert "balance_by_layer/max_violation/layer_1" in events.Tags()["scalars"]
    assert len(events.Images("expert_load")) > 0


def test_the_saved_config_starts_the_same_run_again(run, tmp_path):
    saved = json.loads((run / "config.json").read_text())
    assert saved["model"]["args"]["dim"] == 64
    assert saved["optimizer"]["beta2"] == 0.95, "defaults are written out too"
    config = f"--job.config_file={run / 'config.json'}"
    assert main([config, f"--job.dump_folder={tmp_path}"]) == 0
    assert losses(tmp_path) == losses(run)


def test_a_saved_config_takes_another_flavor_and_sequence_length(run, tmp_path):
    """Values derived from an earlier flavor or length must not come back with the file."""
    config = f"--job.config_file={run / 'config.json'}"
    other = ["--model.flavor=debugmodel_node_limited", "--training.seq_len=16"]
    assert main([config, *other, f"--job.dump_folder={tmp_path}", "--training.steps=1"]) == 0
    args = json.loads((tmp_path / "model_args.json").read_text())
    assert args["max_seq_len"] == 16 and args["moe_args"]["num_limited_groups"] == 2
    assert args["dim"] == 64, "what the user set stays"


def test_the_seed_alone_decides_the_losses(run, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    assert main(tiny(same, training__steps=STEPS)) == 0
    assert main(tiny(other, training__steps=STEPS, debug__seed=8)) == 0
    assert losses(same) == losses(run)
    assert all(a != b for a, b in zip(losses(other), losses(run), strict=True))


def test_without_a_seed_each_run_differs(tmp_path):
    found = []
    for name in ("first", "second"):
        options = [o for o in tiny(tmp_path / name, training__steps=1) if "debug.seed" not in o]
        assert main(options) == 0
        found += losses(tmp_path / name)
    assert found[0] != found[1]


@pytest.mark.parametrize("limited", [False, True])
def test_both_debug_flavors_train(tmp_path, limited):
    flavor = "debugmodel_node_limited" if limited else "debugmodel"
    assert main(tiny(tmp_path, model__flavor=flavor, training__steps=1)) == 0
    args = json.loads((tmp_path / "model_args.json").read_text())["moe_args"]
    assert args["num_limited_groups"] == (2 if limited else None)
    assert len(losses(tmp_path)) == 1
