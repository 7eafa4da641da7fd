"""Numbers that are none, sizes beyond all machines, paths that nothing can have: all refused."""

import dataclasses
import os
import re
import time

import pytest
import torch

from tests.tiny_run import as_option, tiny
from torchtitan.config import ConfigManager, JobConfig, Parallelism, resolve_degrees
from torchtitan.config.degrees import divisors
from torchtitan.config.phases import RunSchedule, StepSettings
from torchtitan.config.rules.text import PATHS
from torchtitan.config.schedule_tables import Phase
from torchtitan.config.schema import KEYS, entries
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.train import main

HUGE = "1" + "0" * 400
MOE = "model.args.moe_args"


def refusal(capfd, tmp_path, *options: str) -> str:
    """The sentence with which `--job.check_config` ends, in no time."""
    began = time.process_time()
    assert main([*tiny(tmp_path), "--job.check_config", *options]) == 2
    assert time.process_time() - began < 5
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if " E " in line]
    assert out == "" and len(lines) == 1 and "Traceback" not in err, err
    return lines[0].partition(" E ")[2]


@pytest.mark.parametrize(
    "option, parts",
    [
        (f"{MOE}.route_scale=nan", [MOE, "route_scale (NaN)", "finite"]),
        ("model.args.rope_theta=inf", ["model.args", "rope_theta (Infinity)", "finite"]),
        (f"{MOE}.load_balance_coeff=inf", [MOE, "load_balance_coeff (Infinity)", "finite"]),
        (f"model.args.rope_theta={HUGE}", ["model.args", "rope_theta (1000", "finite"]),
        ("model.args.norm_eps=nan", ["norm_eps", "finite"]),
        ("model.args.norm_eps=1e-60", ["norm_eps (1e-60)", "smallest"]),
        ("model.args.mtp_loss_weight=nan", ["mtp_loss_weight", "finite"]),
        ("model.args.mscale=-inf", ["mscale", "finite"]),
        (f"{MOE}.z_loss_coeff=1e39", ["z_loss_coeff (1e+39)", "finite"]),
        (f"{MOE}.route_scale=0.0", ["route_scale (0.0)", "above 0"]),
        (f"model.args.n_layers={'[' * 3000}", ["model.args.n_layers", "wrong type"]),
        (f"model.args.n_layers={'1' * 5000}", ["model.args.n_layers", "wrong type"]),
        ("model.args.n_layers=1000000000", ["n_layers (1000000000)", "at most 1,024"]),
        (f"{MOE}.num_experts=1000000000000", ["num_experts", "at most 65,536"]),
        (f"training.seq_len={HUGE}", ["training.seq_len = 1000", "at most 16,777,216"]),
        ("training.seq_len=4000000000", ["training.seq_len", "at most 16,777,216"]),
        (f"training.steps={2**70}", ["training.steps", "at most"]),
        ("optimizer.lr=1e39", ["optimizer.lr = 1e+39", "finite", "fp32"]),
        ("optimizer.eps=1e-50", ["optimizer.eps", "fp32"]),
        ("optimizer.weight_decay=nan", ["optimizer.weight_decay", "finite"]),
        ("validation.seq_len=-99999999999", ["validation.seq_len", "at least"]),
        ("activation_checkpoint.selective_ac_option=" + "9" * 5000, ["selective_ac_option"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_number_that_is_none_is_refused(capfd, tmp_path, option, parts):
    sentence = refusal(capfd, tmp_path, f"--{option}")
    assert all(part in sentence for part in parts), sentence


def test_numbers_that_are_too_large_together_are_refused(capfd, tmp_path):
    wide = ["--model.args.dim=16000000", "--model.args.vocab_size=16000000"]
    sentence = refusal(capfd, tmp_path, *wide)
    assert "a model of 5.1e+14 weights" in sentence and "dim (16000000)" in sentence
    long = ["--training.local_batch_size=16777216", "--training.seq_len=256"]
    assert refusal(capfd, tmp_path, *long).startswith(
        "training.local_batch_size (16777216) x seq_len (256) = 4294967296 must be at most"
    )


def test_a_huge_node_is_refused_without_counting_up_to_it():
    parallelism = Parallelism(expert_parallel_degree=2, expert_parallel_node_size=2**31 - 1)
    with pytest.raises(UserError, match="set it to 2147483646 or 2147483648"):
        resolve_degrees(parallelism, 2)


@pytest.mark.parametrize(
    "table, key, sentence",
    [
        ({"tokens": 1e6, "lr": 1e39}, "schedule.phase", "schedule.phase 1: lr = 1e+39 must be"),
        ({"tokens": 1e17}, "schedule.phase", "tokens = 1e+17 must be a number of tokens"),
        (
            {"tokens": 1e6, "global_balance_coeff": 10**400},
            "schedule.phase",
            "schedule.phase 1: global_balance_coeff = 1000",
        ),
        (
            {"tokens": 1e6, "seq_len": 10**12},
            "schedule.phase",
            "1: seq_len = 1000000000000 must be",
        ),
        (
            {"tokens": 1e15, "batch_size": 4 * 10**6, "batch_size_shape": "linear"}
            | {"batch_size_step": 4},
            "schedule.phase",
            "makes 999999 stairs",
        ),
        ({"match": ["*"], "lr_factor": 1e-50}, "optimizer.group", "1: lr_factor = 1e-50 must be"),
        ({"match": ["*"], "weight_decay": 1e39}, "optimizer.group", "1: weight_decay = 1e+39"),
        ({"watch": "loss", "above": 1e300}, "metrics.alarm", "metrics.alarm 1: above = 1e+300"),
        (
            {"watch": "loss", "above": 1, "times": 2**40},
            "metrics.alarm",
            "1: times = 1099511627776",
        ),
        ({"name": "a", "weight": 1e39, "dataset": "sample"}, "training.blend", "1: weight = 1e+39"),
    ],
)
def test_a_number_inside_a_table_is_refused_too(capfd, tmp_path, table, key, sentence):
    assert sentence in refusal(capfd, tmp_path, as_option([table], key))


def test_what_may_be_infinite_or_huge_stays_allowed(capfd, tmp_path):
    options = [
        "--training.max_norm=inf",
        f"--training.steps={2**40}",
        "--optimizer.weight_decay=-0.0",
    ]
    assert main([*tiny(tmp_path), *options, "--job.check_config"]) == 0


def test_many_steps_on_many_stairs_are_counted_at_once():
    before = StepSettings(0, "", 1e-3, 8, 32, 8)
    stairs = {"batch_size": 8_008, "batch_size_shape": "linear", "batch_size_step": 8}
    schedule = RunSchedule([Phase(tokens=1e12, **stairs), Phase(tokens=1e6)], before)
    began = time.process_time()
    assert schedule.num_steps() > 5e6 and len(schedule.first_sequences()) == 2
    assert time.process_time() - began < 2


@pytest.mark.parametrize("tokens", [1e4, 12_345.0, 99_999.0])
def test_counting_by_stairs_is_counting_by_steps(tokens):
    stairs = {"batch_size": 40, "batch_size_shape": "linear", "batch_size_step": 8}
    schedule = RunSchedule([Phase(tokens=tokens, **stairs)], StepSettings(0, "", 1e-3, 8, 7, 8))
    seen = steps = 0
    while seen < tokens:
        now = schedule.at(seen)
        seen, steps = seen + now.batch_size * now.seq_len, steps + 1
    assert schedule.num_steps() == steps


def test_divisors_come_in_order_and_at_once():
    assert [divisors(n) for n in (1, 2, 12, 36)] == [
        [n for n in range(1, m + 1) if m % n == 0] for m in (1, 2, 12, 36)
    ]
    assert divisors(2**31 - 1) == [1, 2**31 - 1]


@pytest.mark.parametrize(
    "family, flavor", [("deepseek_v3", "debugmodel"), ("qwen3", "debugmodel_moe")]
)
def test_weights_are_counted_without_building_them(family, flavor):
    spec = get_train_spec(family)
    changes = [{}, {"n_mtp_layers": 2}] if family == "deepseek_v3" else [{}, {"moe_enabled": False}]
    for change in changes:
        args = dataclasses.replace(spec.model_args[flavor], **change)
        with torch.device("meta"):
            counted = sum(p.numel() for p in spec.model_cls(args).parameters())
        assert args.num_weights == pytest.approx(counted, rel=2e-3)


# ---------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------


def test_the_home_folder_is_meant_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "any.toml").write_text(
        '[training]\ndataset_path = "~/d"\n[[training.blend]]\nname = "a"\ndataset_path = "~/b"\n'
    )
    paths = [key for key in PATHS if key in KEYS and key != "training.dataset_path"]
    options = [f"--{key}=~/x" for key in paths if key != "job.config_file"]
    config = ConfigManager().parse_args(["--job.config_file=~/any.toml", *options])
    found = {entry.title: entry.value for entry in entries(config) if entry.key in PATHS}
    assert found.pop("job.config_file") == f"{tmp_path}/any.toml"
    assert found.pop("training.dataset_path") == f"{tmp_path}/d"
    assert found.pop("training.blend 1: dataset_path") == f"{tmp_path}/b"
    assert set(found.values()) == {f"{tmp_path}/x"} and len(found) == len(paths) - 1


def test_every_key_that_reads_like_a_path_is_one():
    named = {e.key for e in entries(JobConfig()) if re.search("_(path|folder|file|csv)$", e.key)}
    assert named <= PATHS and {"training.blend.dataset_path"} <= PATHS


def test_a_run_writes_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(tiny("~/out", training__steps=1)) == 0
    assert (tmp_path / "out/metrics.jsonl").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "key, path, words",
    [
        ("model.hf_assets_path", "x" * 300, "has a name of 300 bytes"),
        ("job.dump_folder", "x/" * 3000, "paths have at most 4095"),
        ("checkpoint.folder", "é" * 200, "has a name of 400 bytes"),
        ("training.dataset", "a" * 300, "has a name of 300 bytes"),
        ("training.dataset_path", "a\0b", "holds a NUL character"),
        ("metrics.save_tb_folder", "tb\n", "line break"),
        ("job.dump_folder", "~nosuchuser/x", "user 'nosuchuser', who is unknown"),
        ("model.hf_assets_path", "", "must be a path, not empty"),
        ("checkpoint.folder", "a\udcff", "not UTF-8 text"),
        ("job.description", "a\udcff", "not UTF-8 text"),
        ("job.config_file", "y" * 300, "has a name of 300 bytes"),
        ("job.config_file", "a\0b", "holds a NUL character"),
        ("job.save_config_file", "/", "a file inside job.dump_folder"),
        ("job.save_config_file", "../mine.toml", "a file inside job.dump_folder"),
        ("job.save_config_file", "/srv/mine.toml", "a file inside job.dump_folder"),
        ("job.save_config_file", "sub/", "a file inside job.dump_folder"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_path_that_nothing_can_have_is_refused(capfd, tmp_path, key, path, words):
    sentence = refusal(capfd, tmp_path, f"--{key}={path}")
    assert sentence.startswith(f"{key} = ") and words in sentence


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def test_a_file_inside_a_file_is_told(toml, caplog):
    option = toml('[job]\nconfig_file = "base.toml"\n')
    assert ConfigManager().parse_args([option]).job.config_file == option.partition("=")[2]
    assert 'job.config_file = "base.toml" is not read' in caplog.text


@pytest.mark.parametrize(
    "text, words",
    [
        ("a = 1\n" * 200_000, "bytes, but a config has at most"),
        ("[model.args]\ndim = " + "[" * 3000 + "]" * 3000, "16 deep"),
        ("[model.args]\ndim = " + "[" * 40 + "]" * 40, "16 deep"),
        (f"[model.args]\n{'a.' * 400}a = 1", "16 deep"),
        (f"[training]\nseq_len = {'1' * 5000}", "integer of more than 4300 digits"),
        ('"training.steps" = 3', '"training.steps" holds a dot'),
        ("[[optimizer]]\nlr = 1.0", "optimizer = "),
        ("[model]\nargs = 'x'", "model.args = "),
        ("[training]\nsteps = 1\nsteps = 2", "is not valid TOML"),
        ("[job]\n".encode("utf-16"), "is not UTF-8 text"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_no_config_is_named(toml, text, words):
    with pytest.raises(UserError) as error:
        ConfigManager().parse_args([toml(text)])
    assert "run.toml" in str(error.value) and words in str(error.value)


def test_a_key_twice_in_json_is_refused(toml):
    with pytest.raises(UserError, match=r'run\.json: the key "steps" occurs twice'):
        ConfigManager().parse_args([toml('{"training": {"steps": 1, "steps": 2}}', "run.json")])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="is a pipe or a device"):
            ConfigManager().parse_args([f"--job.config_file={path}"])


def test_a_neighbour_is_hinted_at_only_where_it_is_near(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(UserError) as error:
        ConfigManager().parse_args([f"--job.config_file={tmp_path}/nope.toml"])
    assert str(error.value) == (
        f"job.config_file {tmp_path}/nope.toml does not exist; name a TOML file, such as "
        "train_configs/debug_model.toml."
    )


def test_sentences_about_model_arguments_name_the_file_they_stand_in(capfd, tmp_path, toml):
    file = toml("[model.args]\nn_layer = 3\n")
    assert refusal(capfd, tmp_path, file).startswith(
        f"{tmp_path}/run.toml: model.args.n_layer is not a model argument; did you mean 'n_layers'?"
    )
    good = toml("[model.args]\nn_layers = 3\n")
    assert refusal(capfd, tmp_path, good, "--model.args.dim=0").startswith("model.args: dim (0)")


def test_a_config_that_fits_is_told_what_it_comes_to(capfd, tmp_path):
    options = tiny(tmp_path, training__steps=7)
    assert main([*options, "--job.check_config"]) == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(
        r"The config fits: 1 process, deepseek_v3 debugmodel with \d+ k parameters, 7 steps of "
        r"4 sequences of 32 tokens\. Its data was not read\.\n",
        out,
    )
    assert err == ""
