"""Each key of [checkpoint] does what its sentence says; folders are whole or none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from tests.tiny_run import losses, records, tiny
from torchtitan.components.checkpoint.dcp_storage import read_tensor_index
from torchtitan.components.checkpoint.folder import (
    begin,
    clean_up,
    damage,
    keep_latest,
    publish,
    steps_with_folder,
)
from torchtitan.config import CHECKPOINT_PARTS, ConfigManager, validate
from torchtitan.tools.errors import UserError
from torchtitan.train import main
from torchtitan.trainer import Trainer

ENABLED = {"checkpoint__enable": True, "checkpoint__interval": 2}
FULL = ENABLED | {"checkpoint__last_save_model_only": False}


def run(folder: Path, **changes: Any) -> list[float]:
    assert main(tiny(folder, **changes)) == 0
    return losses(folder)


def steps(folder: Path) -> list[int]:
    return [step for step, whole in steps_with_folder(folder / "checkpoint").items() if whole]


def meta(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"checkpoint/step-{step}/meta.json").read_text())


def saved_tensors(folder: Path, step: int) -> dict[str, torch.dtype]:
    index = read_tensor_index(folder / f"checkpoint/step-{step}")
    return {name: each.properties.dtype for name, each in index.state_dict_metadata.items()}


# ---------------------------------------------------------------------------------------------
# When, and what
# ---------------------------------------------------------------------------------------------


def test_the_same_command_again_goes_on_and_after_the_end_does_nothing(tmp_path):
    straight = run(tmp_path / "straight", **FULL, training__steps=5)
    assert len(straight) == 5
    run(tmp_path / "parts", **FULL, training__steps=5)
    assert run(tmp_path / "parts", **FULL, training__steps=5) == straight, "no step twice"
    assert steps(tmp_path / "parts") == [2, 4, 5]


def test_a_seed_that_was_drawn_is_kept_when_the_run_goes_on(tmp_path):
    """Another seed would be another order of the data, so this one would be refused."""
    options = [o for o in tiny(tmp_path, **FULL, training__steps=5) if "debug.seed" not in o]
    assert main(options) == 0
    seed = meta(tmp_path, 2)["seed"]
    for step in (4, 5):
        (tmp_path / f"checkpoint/step-{step}/COMPLETE").unlink()
    first = losses(tmp_path)
    assert main(options) == 0
    assert meta(tmp_path, 5)["seed"] == seed
    assert losses(tmp_path)[-3:] == first[-3:]


def test_interval_first_step_and_keep_latest_k(tmp_path):
    first = {"checkpoint__enable_first_step_checkpoint": True}
    run(tmp_path / "all", **FULL | first, training__steps=5, checkpoint__keep_latest_k=0)
    assert steps(tmp_path / "all") == [1, 2, 4, 5]
    run(tmp_path / "two", **FULL | first, training__steps=5, checkpoint__keep_latest_k=2)
    assert steps(tmp_path / "two") == [4, 5]


def test_meta_json_tells_people_what_they_have(tmp_path):
    run(tmp_path, **FULL)
    found = meta(tmp_path, 4)
    assert found["step"] == 4 and found["tokens_seen"] == 4 * 4 * 32 and found["seed"] == 7
    assert found["content"] == "everything" and found["layout"]["world_size"] == 1
    assert found["model"]["flavor"] == "debugmodel" and found["model"]["args"]["n_layers"] == 2
    assert found["versions"]["torch"] == torch.__version__ and len(found["config_hash"]) == 16
    changed = run(tmp_path / "other", **FULL, optimizer__lr=1e-3)
    assert changed and meta(tmp_path / "other", 4)["config_hash"] != found["config_hash"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_last_checkpoint_may_be_weights_alone_in_another_type(tmp_path, dtype):
    run(tmp_path, **ENABLED, checkpoint__export_dtype=dtype, training__steps=3)
    assert meta(tmp_path, 3)["content"] == "weights"
    tensors = saved_tensors(tmp_path, 3)
    assert all(name.startswith("model.") for name in tensors)
    bias = tensors.pop("model.layers.1.moe.expert_bias")
    assert bias == torch.float32, "a rounded bias would route differently"
    assert set(tensors.values()) == {getattr(torch, dtype)}
    assert {name.partition(".")[0] for name in saved_tensors(tmp_path, 2)} == {
        "model",
        "optimizer",
        "rng",
    }


def test_a_run_that_is_prolonged_goes_on_from_the_last_full_checkpoint(tmp_path, capfd):
    run(tmp_path, **ENABLED, training__steps=4)
    run(tmp_path, **ENABLED, training__steps=6)
    said = capfd.readouterr().err
    assert "step-4 is skipped: it holds only weights, and its step is not the run's last" in said
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_saved_only_weights_is_told_how_it_goes_on_and_does(tmp_path, capfd):
    rare = {"checkpoint__enable": True, "checkpoint__interval": 100}
    run(tmp_path, **rare, training__steps=4)
    assert main(tiny(tmp_path, **rare, training__steps=6)) == 2
    said = capfd.readouterr().err
    assert "set checkpoint.load_step = 4, which" in said and "last_save_model_only = false" in said
    run(tmp_path, **rare, training__steps=6, checkpoint__load_step=4)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_rank_of_its_own_reads_what_dcp_wrote(tmp_path):
    """The format is DCP's: its own reader understands it."""
    run(tmp_path, **FULL)
    tensors = {"model.norm.weight": torch.zeros(64)}
    torch.distributed.checkpoint.load(
        tensors, storage_reader=FileSystemReader(tmp_path / "checkpoint/step-4"), no_dist=True
    )
    assert tensors["model.norm.weight"].any()


# ---------------------------------------------------------------------------------------------
# Which one is loaded
# ---------------------------------------------------------------------------------------------


def test_load_step_names_one_and_load_only_saves_nothing(tmp_path):
    straight = run(tmp_path, **FULL, training__steps=6)
    before = sorted(path.name for path in (tmp_path / "checkpoint").rglob("*"))
    again = run(
        tmp_path, **FULL, training__steps=6, checkpoint__load_step=2, checkpoint__load_only=True
    )
    assert again == straight
    assert sorted(path.name for path in (tmp_path / "checkpoint").rglob("*")) == before


def test_initial_load_takes_weights_and_if_told_all_the_rest(tmp_path):
    straight = run(tmp_path / "old", **FULL, training__steps=4)
    path = {"checkpoint__initial_load_path": tmp_path / "old/checkpoint/step-2"}
    weights = run(tmp_path / "weights", **FULL | path, training__steps=4)
    assert len(weights) == 4, "from step 1"
    assert weights[0] < straight[0] and weights[0] != straight[2], "other data, no optimizer state"
    everything = {"checkpoint__initial_load_model_only": False}
    assert run(tmp_path / "all", **FULL | path | everything, training__steps=4) == straight[2:]
    # The run's own checkpoints come first.
    assert run(tmp_path / "weights", **FULL | path, training__steps=5)[:4] == weights


def test_a_seed_checkpoint_is_the_model_as_initialised(tmp_path):
    plain = run(tmp_path / "plain")
    assert main(tiny(tmp_path / "seed", **FULL, checkpoint__create_seed_checkpoint=True)) == 0
    assert steps(tmp_path / "seed") == [0] and not (tmp_path / "seed/metrics.jsonl").read_text()
    begun = run(tmp_path / "seed", **FULL, debug__seed=7)
    assert begun == plain
    path = {"checkpoint__initial_load_path": tmp_path / "seed/checkpoint/step-0"}
    other = run(tmp_path / "other", **FULL | path, debug__seed=8)
    assert other != plain and abs(other[0] - plain[0]) < 0.1, "these weights, another data order"


EMA = {"ema__enable": True, "ema__decay": 0.5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(folder, **FULL | EMA, training__steps=2)
    return folder


@pytest.mark.parametrize("part", CHECKPOINT_PARTS)
def test_a_part_that_is_excluded_stays_as_a_new_run_has_it(trained, part):
    settings = {"training__steps": 4, "checkpoint__exclude_from_loading": part}
    torch.manual_seed(99)
    trainer = Trainer(ConfigManager().parse_args(tiny(trained, **FULL | EMA | settings)))
    random_state, weight = torch.get_rng_state(), trainer.model.output.weight.clone()
    fresh = {
        "optimizer": not trainer.optimizer.state,
        "lr_scheduler": trainer.lr_scheduler.last_epoch == 0,
        "dataloader": trainer.dataloader.local_state()["consumed"] == 0,
        "train_state": trainer.step == trainer.tokens_seen == 0,
        "ema": bool(torch.equal(weight, trainer.average.tensors()["output.weight"])),
    }
    torch.manual_seed(7)  # what a new run begins with
    trainer.model.init_weights()
    fresh["model"] = bool(torch.equal(weight, trainer.model.output.weight))
    # A new run's random state is that after the weights were drawn; the saved one is the same, as
    # training draws nothing, so this tells nothing about "rng": see the next test.
    trainer.close()
    assert random_state.any()
    assert {name for name, is_fresh in fresh.items() if is_fresh} == {part} - {"rng"}


@pytest.mark.parametrize("excluded", [False, True])
def test_random_states_come_back_unless_they_are_excluded(tmp_path, excluded):
    options = tiny(tmp_path, **FULL, training__steps=4)
    trainer = Trainer(ConfigManager().parse_args(options))
    torch.rand(5)
    expected = torch.get_rng_state()
    trainer.step = 2
    trainer.checkpoint.save(trainer.run_state, 2)
    trainer.close()
    exclude = ["--checkpoint.exclude_from_loading=rng"] if excluded else []
    trainer = Trainer(ConfigManager().parse_args([*options, *exclude]))
    assert torch.equal(torch.get_rng_state(), expected) == (not excluded)
    trainer.close()


def test_hugging_face_weights_out_and_in(tmp_path):
    """They come back as those of a checkpoint of our own do."""
    flavor = {"model__args.moe_args.route_norm": True}
    run(tmp_path / "ours", **ENABLED | flavor)
    run(tmp_path / "hf", **ENABLED | flavor, checkpoint__last_save_in_hf=True)
    exported = tmp_path / "hf/checkpoint/step-4-hf"
    assert (exported / "config.json").exists() and list(exported.glob("*.safetensors"))
    from_hf = {"checkpoint__initial_load_path": exported, "checkpoint__initial_load_in_hf": True}
    from_ours = {"checkpoint__initial_load_path": tmp_path / "ours/checkpoint/step-4"}
    expected = run(tmp_path / "a", **ENABLED | flavor | from_ours)
    assert run(tmp_path / "b", **ENABLED | flavor | from_hf) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------
# Settings that contradict each other
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "world_size", "part"),
    [
        ("--checkpoint.interval=0", 1, "checkpoint.interval = 0 must be 1 or more"),
        ("--checkpoint.keep_latest_k=-1", 1, "checkpoint.keep_latest_k = -1 must be 0 or more"),
        ("--checkpoint.load_step=-2", 1, "checkpoint.load_step = -2 must be 0 or more, or -1"),
        ("--checkpoint.exclude_from_loading=optim", 1, "did you mean 'optimizer'?"),
        ("--checkpoint.create_seed_checkpoint", 1, "needs checkpoint.enable = true"),
        ("--checkpoint.enable --checkpoint.create_seed_checkpoint", 2, "start it with NGPU=1"),
        (
            "--checkpoint.enable --checkpoint.create_seed_checkpoint --checkpoint.load_only",
            1,
            "checkpoint.load_only forbids it",
        ),
        (
            "--checkpoint.enable --checkpoint.initial_load_in_hf_quantized",
            1,
            "needs checkpoint.initial_load_in_hf = true",
        ),
        (
            "--checkpoint.enable --checkpoint.initial_load_in_hf "
            "--checkpoint.no_initial_load_model_only",
            1,
            "holds only weights; set it to true",
        ),
        (
            "--checkpoint.enable --checkpoint.last_save_in_hf --checkpoint.no_last_save_model_only",
            1,
            "set checkpoint.last_save_model_only to true",
        ),
        ("--training.non_finite_loss=rewind", 1, "needs checkpoints to go back to"),
        ("--training.loss_spike=rewind --checkpoint.enable --checkpoint.load_only", 1, "go back"),
        ("--training.loss_spike_factor=1", 1, "must be a finite number above 1"),
    ],
)
def test_settings_that_make_no_sense_are_told_why(options, world_size, part):
    with pytest.raises(UserError) as refusal:
        validate(ConfigManager().parse_args(options.split()), world_size)
    assert part in str(refusal.value)


# ---------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------

TEXTS = {"meta.json": "{}", "state.json": "{}"}


def write(folder: Path, step: int) -> Path:
    tmp = begin(folder, step)
    (tmp / ".metadata").write_text("index")
    from torchtitan.components.checkpoint.folder import FileChecksum, _sha256

    return publish(tmp, TEXTS, {".metadata": FileChecksum(5, _sha256("index"))})


def test_a_step_that_is_saved_again_replaces_the_former_folder(tmp_path):
    (write(tmp_path, 3) / "state.json").write_text("broken")
    assert damage(tmp_path / "step-3") is not None
    assert damage(write(tmp_path, 3)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_what_a_kill_leaves_behind_is_cleaned_up_and_nothing_else_is(tmp_path):
    write(tmp_path, 2), write(tmp_path, 3), write(tmp_path, 4)
    # Killed in the middle of a replacement: before and after the new one has its name.
    (tmp_path / "step-2").rename(tmp_path / "step-2.old")
    (tmp_path / "step-3").rename(tmp_path / "step-3.old")
    write(tmp_path, 3)
    (begin(tmp_path, 5) / "__0_0.distcp").write_text("half")
    begin(tmp_path, 6)
    (tmp_path / "step-7.tmp").mkdir()
    (tmp_path / "step-7.tmp/my notes").write_text("not ours")
    (tmp_path / "step-8-hf").mkdir()
    clean_up(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-2", "step-3", "step-4", "step-7.tmp", "step-8-hf"]
    assert [damage(tmp_path / f"step-{step}") for step in (2, 3, 4)] == [None] * 3


def test_incomplete_folders_neither_count_nor_go_when_old_ones_are_deleted(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "step-3/COMPLETE").unlink()
    keep_latest(tmp_path, 2)
    assert steps_with_folder(tmp_path) == {2: True, 3: False, 4: True}
