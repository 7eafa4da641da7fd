"""Checkpoints that are damaged, foreign, of another model, or not writable: each its sentence."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from tests.fault_tests.disks import mounted
from tests.tiny_run import losses, records, tiny
from torchtitan.components.checkpoint.dcp_storage import CheckpointWriter, read_tensor_index
from torchtitan.config import ConfigManager
from torchtitan.tools.errors import RunError, UserError
from torchtitan.train import main
from torchtitan.trainer import Trainer, built_run

SAVES = {
    "checkpoint__enable": True,
    "checkpoint__interval": 1,
    "checkpoint__last_save_model_only": False,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Four steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(tiny(folder, **SAVES)) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy without the last checkpoint: it has step 4 still to do."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint/step-4")
    return tmp_path / "run"


def sentence(capfd) -> str:
    """The one error of a run that ended without a traceback."""
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if " E " in line]
    assert len(errors) == 1 and "Traceback" not in said, said
    return errors[0].partition(" E ")[2]


# ---------------------------------------------------------------------------------------------
# Damaged
# ---------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


WRONG_SUM, LACKS_BYTES = "its checksum differs", "bytes instead of"
DAMAGES = {
    "tensors, one bit": (flip, "__0_0.distcp", WRONG_SUM),
    "tensors, cut short": (truncate, "__0_0.distcp", LACKS_BYTES),
    "tensors, gone": (Path.unlink, "__0_0.distcp", "__0_0.distcp is missing"),
    "index, one bit": (flip, ".metadata", WRONG_SUM),
    "index, gone": (Path.unlink, ".metadata", ".metadata is missing"),
    "numbers, one bit": (flip, "state.json", WRONG_SUM),
    "meta, cut short": (truncate, "meta.json", LACKS_BYTES),
    "manifest, one bit": (flip, "manifest.json", "does not have the checksum that COMPLETE holds"),
    "manifest, gone": (Path.unlink, "manifest.json", "it can't be read"),
    "marker, gone": (Path.unlink, "COMPLETE", "is not a complete checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(run, trained, damage, capfd):
    harm, name, why = DAMAGES[damage]
    harm(run / "checkpoint/step-3" / name)
    assert main(tiny(run, **SAVES)) == 0
    said = capfd.readouterr().err
    assert "step-3" in said and "is skipped" in said and why in said
    assert "step-2 in" in said and losses(run)[-2:] == losses(trained)[-2:]
    # The damaged one has given way to the new one of the same step.
    assert "is skipped" not in rerun(run, capfd)


def rerun(folder: Path, capfd) -> str:
    assert main(tiny(folder, **SAVES)) == 0
    return capfd.readouterr().err


def test_a_run_all_of_whose_checkpoints_are_damaged_does_not_begin_anew_in_silence(run, capfd):
    for step in (1, 2, 3):
        flip(run / f"checkpoint/step-{step}/__0_0.distcp")
    assert main(tiny(run, **SAVES)) == 2
    said = sentence(capfd)
    assert "no checkpoint in" in said and "step-1 (__0_0.distcp does not have" in said


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run, tmp_path, capfd):
    flip(run / "checkpoint/step-3/__0_0.distcp")
    assert main(tiny(run, **SAVES, checkpoint__load_step=3)) == 2
    assert "checkpoint.load_step = 3: checkpoint" in (said := sentence(capfd)) and WRONG_SUM in said
    path = {"checkpoint__initial_load_path": run / "checkpoint/step-3"}
    assert main(tiny(tmp_path / "new", **SAVES, **path)) == 2
    assert "checkpoint.initial_load_path: checkpoint" in sentence(capfd)


# ---------------------------------------------------------------------------------------------
# Foreign
# ---------------------------------------------------------------------------------------------


def sign(checkpoint: Path) -> None:
    """Write checksums that fit what is there, as an attacker would."""
    manifest = {
        path.name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in checkpoint.iterdir()
        if path.name not in ("manifest.json", "COMPLETE")
    }
    text = json.dumps(manifest)
    (checkpoint / "manifest.json").write_text(text)
    (checkpoint / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


class RunsCode:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_an_index_that_would_run_code_is_refused_and_does_not_run_it(run, tmp_path, capfd):
    victim, index = tmp_path / "it ran", run / "checkpoint/step-3/.metadata"
    index.write_bytes(pickle.dumps(RunsCode(victim)))
    sign(index.parent)
    assert main(tiny(run, **SAVES)) == 2
    said = sentence(capfd)
    assert "mkdir, which no checkpoint needs and which could run code" in said
    assert not victim.exists()
    pickle.loads(index.read_bytes())  # by itself it would have
    assert victim.exists()


def test_an_index_that_declares_a_tensor_to_be_a_pickle_is_refused(run, capfd):
    """DCP would unpickle it with all powers, where a run wants a tensor."""
    index = run / "checkpoint/step-3/.metadata"
    metadata = read_tensor_index(index.parent)
    metadata.state_dict_metadata["model.norm.weight"] = BytesStorageMetadata()
    index.write_bytes(pickle.dumps(metadata))
    sign(index.parent)
    assert main(tiny(run, **SAVES)) == 2
    assert "model.norm.weight is not a tensor there" in sentence(capfd)


def test_an_index_may_not_point_out_of_its_folder(run):
    checkpoint = run / "checkpoint/step-3"
    metadata = read_tensor_index(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = "../step-2/__0_0.distcp"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="step-2/__0_0.distcp, outside of the folder"):
        read_tensor_index(checkpoint)


# ---------------------------------------------------------------------------------------------
# Of another model
# ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused_by_name(run, capfd):
    other = {"model__args.n_layers": 3, "model__args.moe_args.num_experts": 4}
    assert main(tiny(run, **SAVES | other)) == 2
    said = sentence(capfd)
    assert "moe_args.num_experts (8 there, 4 here), n_layers (2 there, 3 here)" in said


def test_missing_superfluous_and_misshapen_tensors_are_listed_by_name(run, capfd):
    """Where meta.json says nothing: a checkpoint whose tensors are not what it claims."""
    index = run / "checkpoint/step-3/.metadata"
    metadata = read_tensor_index(index.parent)
    tensors = metadata.state_dict_metadata
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    tensors["model.output.weight"].size = torch.Size((7, 64))
    index.write_bytes(pickle.dumps(metadata))
    sign(index.parent)
    assert main(tiny(run, **SAVES)) == 2
    said = sentence(capfd)
    for part in (
        "model.extra.weight is not part of this model",
        "model.norm.weight is missing",
        "model.output.weight is 7x64 there and 2048x64 here",
    ):
        assert part in said


def test_what_may_differ_between_saving_and_loading_does_not_hinder(run, capfd):
    changes = {"training__seq_len": 16, "optimizer__lr": 1e-3, "training__steps": 6}
    exclude = {"checkpoint__exclude_from_loading": "dataloader"}
    assert main(tiny(run, **SAVES | changes | exclude)) == 0, capfd.readouterr().err
    assert [record["step"] for record in records(run)][-3:] == [4, 5, 6]


def test_names_that_are_not_there_are_answered_with_those_that_are(run, tmp_path, capfd):
    assert main(tiny(run, **SAVES, checkpoint__load_step=7)) == 2
    assert "no complete checkpoint of that step (it has 1, 2, 3)" in sentence(capfd)
    path = {"checkpoint__initial_load_path": run / "checkpoint"}
    assert main(tiny(tmp_path / "new", **SAVES, **path)) == 2
    assert f"did you mean {run}/checkpoint/step-3?" in sentence(capfd)


# ---------------------------------------------------------------------------------------------
# Not writable
# ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_training_goes_on_and_the_next_interval_succeeds(
    tmp_path, caplog, capfd
):
    """A checkpoint has 4.5 MB and the disk 11; 4 of them are taken by another while it trains."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=11m", "tmpfs", str(folder)):
        options = SAVES | {"training__steps": 5, "checkpoint__keep_latest_k": 1}
        with closing(Trainer(ConfigManager().parse_args(tiny(tmp_path, **options)))) as trainer:
            log = trainer.metrics.log

            def fill_and_free(*, step, **record):
                log(step=step, **record)
                if step == 2:
                    (folder / "ballast").write_bytes(bytes(4 << 20))
                if step == 4:
                    assert [path.name for path in folder.glob("step-*")] == ["step-1"]
                    (folder / "ballast").unlink()

            trainer.metrics.log = fill_and_free
            trainer.train()
        failures = [text for text in caplog.messages if "could not be written" in text]
        assert [text.partition(" could")[0] for text in failures] == [
            "the checkpoint of step 2",
            "the checkpoint of step 3",
        ]
        assert "rank 0: No space left on device: 2," in failures[0]
        assert "bytes free, 4,2" in failures[0]
        assert "older checkpoints are unchanged" in failures[0]
        assert len(losses(tmp_path)) == 5, "training went on"
        assert [path.name for path in folder.iterdir()] == ["step-5"]
        assert main(tiny(tmp_path, **options)) == 0
        assert "is skipped" not in capfd.readouterr().err


def test_a_folder_that_becomes_read_only_is_said_and_the_run_fails_in_the_end(
    run, capfd, monkeypatch
):
    folder = str(run / "checkpoint")
    # The run's lock is a file open for writing: no mount with one becomes read-only.
    monkeypatch.setattr(built_run, "alone_in_folders", lambda _: nullcontext())
    with mounted("--bind", folder, folder):
        before = sorted(path.name for path in Path(folder).rglob("*"))
        options = tiny(run, **SAVES | {"training__steps": 6})
        with closing(Trainer(ConfigManager().parse_args(options))) as trainer:
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
            with pytest.raises(RunError, match="the last save of the run failed: .* step 6"):
                trainer.train()
        assert trainer.step == 6, "training went on to its end"
        assert sorted(path.name for path in Path(folder).rglob("*")) == before
        # Whoever starts it now learns so at once.
        assert main(options) == 2
    said = sentence(capfd)
    assert said.startswith(f"checkpoint.folder {folder} can't be written to (Read-only file system")


def test_a_last_save_that_succeeds_forgets_the_failures_before_it(tmp_path, capfd, monkeypatch):
    write, failing = CheckpointWriter.write_data, iter([True, True])

    def sometimes(self, plan, planner):
        if next(failing, False):
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(CheckpointWriter, "write_data", sometimes)
    assert main(tiny(tmp_path, **SAVES, checkpoint__async_mode="async")) == 0
    assert capfd.readouterr().err.count("could not be written") == 2
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["step-3", "step-4"]


def save_where_rank_1_fails(folder: Path, mode: str) -> tuple[int, list[str]]:
    """Steps that are done and checkpoints that are there, after rank 1 failed in two saves."""
    options = tiny(folder, **SAVES, checkpoint__async_mode=mode)
    write, failing = CheckpointWriter.write_data, iter([True, True])

    def sometimes(self, plan, planner):
        if torch.distributed.get_rank() == 1 and next(failing, False):
            raise OSError(5, "Input/output error")
        return write(self, plan, planner)

    CheckpointWriter.write_data = sometimes
    try:
        with closing(Trainer(ConfigManager().parse_args(options))) as trainer:
            trainer.train()
    finally:
        CheckpointWriter.write_data = write
    return trainer.step, sorted(path.name for path in (folder / "checkpoint").glob("step-*"))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_rank_that_can_not_write_fails_the_save_of_all_and_holds_up_nobody(ranks, tmp_path, mode):
    for result in ranks(2).run(save_where_rank_1_fails, tmp_path, mode):
        assert result == (4, ["step-3", "step-4"])
