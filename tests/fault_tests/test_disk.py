"""Full disks, closed folders, files in the place of folders, folders that vanish."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.fault_tests.disks import as_nobody, small_disk
from tests.fault_tests.test_bad_checkpoints import sentence
from tests.scripts import script
from tests.tiny_run import losses, records, tiny
from torchtitan.config import ConfigManager
from torchtitan.distributed.utils import ObjectCollectives
from torchtitan.tools.errors import UserError
from torchtitan.train import main
from torchtitan.trainer import Trainer

SAVES = {
    "checkpoint__enable": True,
    "checkpoint__interval": 1,
    "checkpoint__last_save_model_only": False,
}


def train(folder: Path, at_step: dict[int, Callable[[], None]], **options) -> None:
    """A run in which something happens to its folders before the record of a step is written."""
    with closing(Trainer(ConfigManager().parse_args(tiny(folder, **options)))) as trainer:
        log = trainer.metrics.log

        def disturbed(*, step, **record):
            at_step.get(step, lambda: None)()
            log(step=step, **record)

        trainer.metrics.log = disturbed
        trainer.train()


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder)]


def curve(folder: Path) -> list[int]:
    """Steps in TensorBoard's curve of the loss."""
    (run,) = folder.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    return [point.step for point in events.Scalars("loss_metrics/global_avg_loss")]


# ---------------------------------------------------------------------------------------------
# Metrics and the like: they never end a run
# ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, capfd):
    with small_disk(tmp_path / "full", "24k"):
        folder = tmp_path / "full/o"
        assert main(tiny(folder, training__steps=16, metrics__enable_tensorboard=True)) == 0
        found = steps(folder)
    said = capfd.readouterr().err
    assert found == list(range(1, len(found) + 1)) and len(found) < 16, "whole records only"
    assert said.count("metrics.jsonl can't be written (No space left on device: ") == 1
    assert said.count("tfevents") == 2, "that the curves stop, and what they lack"
    assert f"metrics.jsonl lacks {16 - len(found)} records" in said
    assert "Training finished after step 16" in said and "Traceback" not in said


def test_what_could_not_be_written_follows_when_there_is_room_again(tmp_path, caplog):
    disk = tmp_path / "full"
    with small_disk(disk, "256k"):
        ballast = disk / "ballast"

        def fill():
            with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        happen = {2: fill, 10: ballast.unlink}
        train(disk / "o", happen, training__steps=12, metrics__enable_tensorboard=True)
        assert steps(disk / "o") == curve(disk / "o/tb") == list(range(1, 13))
    assert caplog.text.count("metrics.jsonl can't be written") == 1
    assert caplog.text.count("metrics.jsonl can be written again") == 1


def test_config_files_that_do_not_fit_are_said_and_no_half_ones_are_left(tmp_path, capfd):
    with small_disk(tmp_path / "full", "8k"):  # one page is the lock's
        assert main(tiny(tmp_path / "full/o", training__steps=1)) == 0
        left = {path.name for path in (tmp_path / "full/o").iterdir()}
    assert left == {"model_args.json", "metrics.jsonl"}
    said = capfd.readouterr().err
    assert "o/config.json can't be written (No space left on device" in said


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_device_that_takes_nothing_needs_no_root_to_be_met(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    assert main(tiny(tmp_path, training__steps=3)) == 0
    assert capfd.readouterr().err.count("can't be written (No space left on device") == 1


def test_folders_that_vanish_are_made_anew_and_said(tmp_path, caplog):
    happen = {3: lambda: shutil.rmtree(tmp_path / "o")}
    train(tmp_path / "o", happen, training__steps=5, metrics__enable_tensorboard=True)
    assert steps(tmp_path / "o") == curve(tmp_path / "o/tb") == [3, 4, 5]
    assert caplog.text.count("metrics.jsonl was removed or shortened; a new one is begun") == 1


def test_a_file_that_takes_the_place_of_a_folder_stops_nothing_but_its_records(tmp_path, caplog):
    """Also the trace's, whose failure was a segmentation fault."""

    def replace_all():
        shutil.rmtree(tmp_path / "o")
        (tmp_path / "o").write_text("in the way")

    profiling = {"profiling__enable_profiling": True, "profiling__profile_freq": 4}
    happen = {4: replace_all}
    options = profiling | {"metrics__enable_tensorboard": True}
    train(tmp_path / "o", happen, training__steps=9, **options)
    assert (tmp_path / "o").read_text() == "in the way"
    for name in ("o/metrics.jsonl", "The trace for", "tfevents"):
        said = [text for text in caplog.messages if name in text and "can't be written" in text]
        assert len(said) == 1, said


# ---------------------------------------------------------------------------------------------
# Checkpoints and exports
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_checkpoint_that_does_not_fit_names_the_disk(tmp_path, capfd, mode):
    """One has 4.5 MB and fits; the second does not, and leaves nothing behind."""
    with small_disk(tmp_path / "full", "5m"):
        where = {"checkpoint__folder": tmp_path / "full/c", "checkpoint__async_mode": mode}
        assert main(tiny(tmp_path / "o", **SAVES | where, training__steps=3)) == 1
        assert [path.name for path in (tmp_path / "full/c").iterdir()] == ["step-1"]
    said = capfd.readouterr().err
    assert said.count(f"written to {tmp_path}/full/c: rank 0: No space left on device: ") == 3
    assert "bytes free, 4,2" in said and "bytes needed" in said and "unexpected pos" not in said
    assert "it resumes from step 1, the newest checkpoint." in said
    assert "Traceback" not in said and len(losses(tmp_path / "o")) == 3


def test_an_export_that_does_not_fit_names_the_disk_and_leaves_nothing(tmp_path, capfd):
    options = SAVES | {
        "checkpoint__last_save_model_only": True,
        "checkpoint__last_save_in_hf": True,
    }
    with small_disk(tmp_path / "full", "1m"):
        where = {"checkpoint__folder": tmp_path / "full/c"}
        assert main(tiny(tmp_path / "o", **options | where, training__steps=1)) == 1
        assert not (tmp_path / "full/c").exists()
        said = capfd.readouterr().err
        assert "step-1-hf could not be written: No space left on device: " in said
        assert "bytes needed" in said and "Traceback" not in said
        # A conversion resumes where it stopped, so only its unfinished file goes.
        assert main(tiny(tmp_path / "p", **options, training__steps=1)) == 0
        source, target = tmp_path / "p/checkpoint/step-1-hf", tmp_path / "full/made"
        convert = script("checkpoint_conversion/convert_from_hf.py").main
        capfd.readouterr()
        assert convert([str(source), str(target)]) == 2
        assert "made could not be made (No space left on device: " in sentence(capfd)
        assert [path.name for path in Path(f"{target}.tmp").iterdir()] == ["progress.jsonl"]


def ask_rank_0_for_what_it_may_not_read() -> str:
    def read():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/there")

    def refuse():
        raise UserError("not this one")

    import torch.distributed as dist

    ranks = ObjectCollectives(dist.group.WORLD)
    said = []
    for ask in (read, refuse):
        try:
            ranks.from_rank_0(ask)
        except (OSError, UserError) as error:
            said.append(str(error))
    return " | ".join(said)


def test_what_rank_0_can_not_read_is_raised_on_all_ranks_and_holds_up_nobody(ranks):
    said = ranks(2).run(ask_rank_0_for_what_it_may_not_read)
    assert said == ["[Errno 13] Permission denied: '/there' | not this one"] * 2


# ---------------------------------------------------------------------------------------------
# Folders that can't be used, before anything is started
# ---------------------------------------------------------------------------------------------

WRITTEN = {
    "job.dump_folder": {},
    "checkpoint.folder": {"checkpoint__enable": True},
    "metrics.save_tb_folder": {"metrics__enable_tensorboard": True},
    "profiling.save_traces_folder": {"profiling__enable_profiling": True},
}


@pytest.fixture
def place() -> Iterator[Path]:
    """pytest's own folders are closed to other users than the one who runs it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def refusal(argv: list[str], capfd) -> str:
    """Sentence that refuses a run, which is not started."""
    capfd.readouterr()
    with as_nobody():
        assert main(argv) == 2
    return sentence(capfd)


@pytest.mark.parametrize("key", WRITTEN)
def test_a_folder_to_write_that_can_not_be_used_is_named_with_its_key(place, capfd, key):
    (place / "file").touch()
    (place / "read-only").mkdir(mode=0o555)
    for name, reason in {
        "file": "is not a folder",
        "read-only/inside": "Permission denied",
    }.items():
        argv = [*tiny(place / "o", **WRITTEN[key]), f"--{key}={place / name}"]
        said = refusal(argv, capfd)
        assert said.startswith(f"{key} {place / name} can't be written to ") and reason in said
    assert not (place / "o").exists()


def test_a_folder_or_file_to_read_that_is_closed_is_named_with_its_key(place, capfd):
    options = SAVES | {"training__steps": 1}
    assert main(tiny(place / "old", **options)) == 0
    weights = {"checkpoint__last_save_model_only": True, "checkpoint__last_save_in_hf": True}
    assert main(tiny(place / "hf", **options | weights)) == 0
    made = {
        "checkpoint.initial_load_path": place / "old/checkpoint/step-1",
        "checkpoint.initial_load_in_hf": place / "hf/checkpoint/step-1-hf",
        "model.hf_assets_path": shutil.copytree("tests/assets/tokenizer", place / "assets"),
    }
    for mode in (0o000, 0o444):  # closed; may be listed, but not entered
        for key, folder in made.items():
            folder.chmod(mode)
            changes = {"model__hf_assets_path": folder}
            if key != "model.hf_assets_path":
                changes = SAVES | {
                    "checkpoint__initial_load_path": folder,
                    "checkpoint__initial_load_in_hf": key.endswith("in_hf"),
                }
            said = refusal(tiny(place / "o", **changes), capfd)
            name = key.replace("load_in_hf", "load_path")
            assert said.startswith(f"{name} {folder} can't be read (Permission denied)"), said
            folder.chmod(0o755)


def test_a_closed_checkpoint_of_the_own_folder_is_not_taken_for_none(place, capfd):
    """A run that began anew would overwrite what it may not see."""
    place.chmod(0o777)
    assert main(tiny(place / "o", **SAVES, training__steps=1)) == 0
    for path in (place / "o", place / "o/checkpoint"):
        path.chmod(0o777)
    (place / "o/checkpoint/step-1").chmod(0o000)
    said = refusal(tiny(place / "o", **SAVES), capfd)
    assert said.startswith(f"{place}/o/checkpoint/step-1 can't be searched for checkpoints")
