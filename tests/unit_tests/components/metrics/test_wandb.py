"""Weights & Biases: the real package, without a network."""

import importlib.util
import json
import struct
import time

import pytest
import torch

from tests.tiny_run import records as lines
from tests.tiny_run import tiny
from torchtitan.components.metrics.wandb_writer import WandbWriter, check_wandb
from torchtitan.tools.errors import UserError
from torchtitan.train import main

installed = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="the package wandb is not installed"
)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_PROJECT", "WANDB_RUN_NAME", "WANDB_TEAM", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def stored(folder):
    """The records in the files of offline runs: a LevelDB log of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.rglob("*.wandb")):
        for message in messages(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            found.append(record)
    return found


def messages(content):
    """Blocks of 32 KiB, after 7 bytes of the whole file's; in them chunks: checksum (4 bytes),
    length (2), kind (1: whole, 2: first, 3: middle, 4: last)."""
    at, message = 7, b""
    while at + 7 <= len(content):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if kind == 0:
            at += rest
            continue
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield message
            message = b""


def history(records):
    """Logged numbers, by record."""
    return [
        {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]


@installed
def test_a_run_sends_its_numbers_under_tensorboards_names(offline, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_PROJECT", "moe")
    monkeypatch.setenv("WANDB_RUN_NAME", "first")
    monkeypatch.setenv("WANDB_TEAM", "us")
    folder = tmp_path / "run"
    assert main(tiny(folder, metrics__enable_wandb="true", training__steps=2)) == 0
    records = stored(folder)
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.display_name, run.entity) == ("moe", "first", "us")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["training"]["steps"] == 2
    sent = history(records)
    assert [numbers["step"] for numbers in sent] == [1, 2]
    losses = [record["loss"] for record in lines(folder)]
    assert [numbers["loss_metrics/global_avg_loss"] for numbers in sent] == losses
    assert "balance/max_violation" in sent[0]


@installed
def test_a_resumed_run_goes_on_with_the_same_one_and_repeated_steps_are_sent(offline, tmp_path):
    first = WandbWriter(tmp_path, 0, {}, "")
    first.write({"step": 1, "loss": 3.0}, None)
    first.write({"step": 2, "loss": 2.0}, None)
    first.close()
    time.sleep(1.1)  # wandb names the folders of a run by the second
    second = WandbWriter(tmp_path, 1, {}, "")
    second.write({"step": 2, "loss": 2.5}, None)
    second.close()
    records = stored(tmp_path)
    ids = {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}
    assert len(ids) == 1
    sent = [(n["step"], n["loss_metrics/global_avg_loss"]) for n in history(records)]
    assert sorted(sent) == [(1, 3.0), (2, 2.0), (2, 2.5)]


def test_a_failure_is_logged_once_and_the_run_goes_on(offline, monkeypatch, tmp_path, caplog):
    def fail(**settings):
        raise RuntimeError("no login")

    fake = type("wandb", (), {"init": staticmethod(fail)})
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    writer = WandbWriter(tmp_path, 0, {}, "")
    writer.write({"step": 1, "loss": torch.tensor(3.0).item()}, None)
    writer.close()
    (line,) = caplog.messages
    assert "no login" in line and "training continues" in line


def test_without_the_package_it_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("torchtitan.components.metrics.wandb_writer.find_spec", lambda name: None)
    check_wandb(False)
    with pytest.raises(UserError, match="pip install wandb, or set it to false"):
        check_wandb(True)
