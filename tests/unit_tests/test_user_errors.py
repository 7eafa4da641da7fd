"""What a user sees who made a mistake: one sentence and exit code 2, before anything is started."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.tiny_run import tiny
from torchtitan.config.schema import KEYS
from torchtitan.data.tokenizer import load_tokenizer
from torchtitan.tools.errors import UserError
from torchtitan.tools.utils import check_local_processes
from torchtitan.train import main

SHIPPED_TOKENIZER = Path(__file__).parents[1] / "assets/tokenizer"

# Name of the mistake: options (in them {tmp} is an empty folder), then parts of the sentence.
MISTAKES = {
    "unknown key": (
        ["--training.stpes=3"],
        ["--training.stpes: unknown key 'stpes' in [training]; did you mean 'steps'?"],
    ),
    "unknown family": (
        ["--model.name=deepseek_v4"],
        ["model.name 'deepseek_v4' is not a model family", "did you mean 'deepseek_v3'?"],
    ),
    "unknown compile back-end": (
        ["--compile.enable", "--compile.backend=inductr"],
        ["compile.backend 'inductr' is not a backend of this torch; did you mean 'inductor'?"],
    ),
    "unknown flavor": (
        ["--model.flavor=debugmodle"],
        ["model.flavor 'debugmodle' is not a flavor", "did you mean 'debugmodel'?"],
    ),
    "unknown model argument": (
        ["--model.args.n_layer=3"],
        ["model.args.n_layer is not a model argument; did you mean 'n_layers'?"],
    ),
    "unknown MoE argument": (
        ["--model.args.moe_args.topk=3"],
        ["model.args.moe_args.topk is not a model argument; did you mean 'top_k'?"],
    ),
    "wrong type of a key": (
        ["--training.steps=1e4"],
        ["--training.steps 1e4 must be an integer, for example 10000."],
    ),
    "wrong type of a model argument": (
        ["--model.args.n_layers=two"],
        ['model.args.n_layers = "two" is of the wrong type', "write a value of that type."],
    ),
    "wrong choice of a model argument": (
        ["--model.args.attn_mask_type=block_casual"],
        [
            "model.args.attn_mask_type",
            '= "block_casual" is not an allowed value',
            "did you mean 'block_causal'?",
        ],
    ),
    "impossible size": (["--model.args.dim=0"], ["model.args: dim (0) must be above 0."]),
    "groups without their limit": (
        ["--model.args.moe_args.num_expert_groups=4"],
        ["model.args.moe_args: num_limited_groups is missing", "from 1 to 4."],
    ),
    "groups that don't divide the experts": (
        [
            "--model.args.moe_args.num_expert_groups=3",
            "--model.args.moe_args.num_limited_groups=1",
        ],
        ["num_expert_groups (3) must divide num_experts (8); the nearest that does is"],
    ),
    "groups of one expert": (
        [
            "--model.args.moe_args.num_expert_groups=8",
            "--model.args.moe_args.num_limited_groups=4",
        ],
        ["num_expert_groups (8) leaves 1 of num_experts (8) in a group", "at most 4 groups"],
    ),
    "more limited groups than groups": (
        [
            "--model.args.moe_args.num_expert_groups=4",
            "--model.args.moe_args.num_limited_groups=5",
        ],
        ["num_limited_groups (5) must lie between 1 and num_expert_groups (4)."],
    ),
    "more experts a token than the limit allows": (
        [
            "--model.args.moe_args.num_expert_groups=4",
            "--model.args.moe_args.num_limited_groups=1",
        ],
        ["top_k (3) is larger than the 2 experts of num_limited_groups (1)"],
    ),
    "positions too few": (
        ["--model.args.max_seq_len=16"],
        ["model.args.max_seq_len (16) must be at least seq_len (32)", "leave it out"],
    ),
    "vocabulary smaller than the tokenizer's": (
        ["--model.args.vocab_size=2047"],
        ["model.hf_assets_path", "2048 tokens", "only 2047", "model.args.vocab_size to at least"],
    ),
    "no such tokenizer": (
        ["--model.hf_assets_path={tmp}/nowhere"],
        ["model.hf_assets_path = '{tmp}/nowhere' is neither a folder nor a file here"],
    ),
    "folder without a tokenizer": (
        ["--model.hf_assets_path={tmp}"],
        ["model.hf_assets_path = '{tmp}' holds no tokenizer; it needs tokenizer.json"],
    ),
    "unknown dataset": (
        ["--training.dataset=c4_tset"],
        ["training.dataset = 'c4_tset' is not known; the nearest name is 'c4_test'"],
    ),
    "no such data": (
        ["--training.dataset=text", "--training.dataset_path={tmp}/*.jsonl"],
        ["training.dataset_path = '{tmp}/*.jsonl' names no file", "correct the path."],
    ),
    "local data without its path": (
        ["--training.dataset=text"],
        ["training.dataset = 'text' reads local files and training.dataset_path is not set"],
    ),
    "dump folder inside of a file": (
        ["--job.dump_folder={tmp}/file/outputs"],
        ["job.dump_folder {tmp}/file/outputs can't be written to ({tmp}/file is not a folder)"],
    ),
    "global batch that doesn't divide": (
        ["--training.global_batch_size=10"],
        ["training.global_batch_size = 10 must be -1 or a multiple of 4", "set it to 8 or 12."],
    ),
    "learning rate below 0": (
        ["--optimizer.lr=-1"],
        ["optimizer.lr = -1.0 must be a finite number, 0 or more."],
    ),
    "trace longer than its period": (
        ["--profiling.enable_profiling", "--profiling.profile_freq=2"],
        ["profiling.profile_freq = 2 is shorter than one trace", "set it to 4 or more."],
    ),
    "pipeline parallelism": (
        ["--parallelism.pipeline_parallel_degree=2"],
        [
            "parallelism.pipeline_parallel_degree = 2 does not divide the number of processes (1)",
            "set it to 1.",
        ],
    ),
    "checkpoint that is not there": (
        ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.load_only"],
        ["checkpoint.create_seed_checkpoint saves and checkpoint.load_only forbids it"],
    ),
    "FP8": (
        ["--model.converters=quantize.linear.float8"],
        [
            "needs a Hopper GPU, but this run is on cpu; set quantize.linear.float8.emulate to ",
            "true to compute the same numbers slowly, or model.converters to [].",
        ],
    ),
    "missing file": (
        ["--job.config_file={tmp}/missing.toml"],
        ["job.config_file {tmp}/missing.toml does not exist; name a TOML file, such as "],
    ),
}


@pytest.fixture
def no_process_group(monkeypatch):
    """Fails the test where one is even tried."""

    def refuse(*args, **kwargs):
        pytest.fail("a process group was started for a config that is wrong")

    monkeypatch.setattr(dist, "init_process_group", refuse)


def sentence_of(capfd) -> str:
    """The one line beside the log's informative ones and warnings."""
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    lines = [line for line in err.splitlines() if not re.match(r"\[titan\] [\d:]+ [IW] ", line)]
    assert len(lines) == 1 and re.match(r"\[titan\] [\d:]+ E ", lines[0]), lines
    return lines[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_sentence_and_nothing_starts(
    mistake, tmp_path, capfd, no_process_group
):
    (tmp_path / "file").touch()
    options, parts = MISTAKES[mistake]
    dump_folder = tmp_path / "outputs"
    wrong = [option.replace("{tmp}", str(tmp_path)) for option in options]
    assert main([*tiny(dump_folder), *wrong]) == 2
    sentence = sentence_of(capfd)
    for part in parts:
        assert part.replace("{tmp}", str(tmp_path)) in sentence
    assert not dump_folder.exists(), "a wrong config leaves nothing behind"


@pytest.mark.parametrize(
    "world_size, options, parts",
    [
        (
            4,
            ["--parallelism.data_parallel_shard_degree=3"],
            ["replicate_degree (1) x data_parallel_shard_degree (3) = 3", "processes is 4", "to 4"],
        ),
        (
            6,
            ["--parallelism.data_parallel_replicate_degree=4"],
            ["data_parallel_replicate_degree = 4 does not divide", "(6)", "set it to 3 or 6."],
        ),
        (
            4,
            ["--parallelism.expert_parallel_degree=3"],
            ["expert_parallel_degree = 3 must divide", "shard degree (4)", "set it to 2 or 4."],
        ),
        (
            4,
            ["--parallelism.expert_parallel_degree=2", "--parallelism.expert_parallel_node_size=3"],
            ["expert_parallel_node_size = 3 must divide", "degree (2)", "set it to 2 or 4."],
        ),
        (
            16,
            ["--parallelism.expert_parallel_degree=16"],
            [
                "expert_parallel_degree = 16 must divide",
                "num_experts (8)",
                "nearest that does is 8",
            ],
        ),
        (
            3,
            ["--parallelism.expert_parallel_degree=3"],
            ["expert_parallel_degree = 3 must divide", "num_experts (8)", "nearest that does is"],
        ),
        (
            2,
            ["--training.global_batch_size=12"],
            ["training.global_batch_size = 12 must be -1 or a multiple of 8", "degree (2)"],
        ),
    ],
)
def test_degrees_must_fit_the_number_of_processes(
    world_size, options, parts, tmp_path, capfd, monkeypatch, no_process_group
):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    assert main([*tiny(tmp_path), *options]) == 2
    sentence = sentence_of(capfd)
    for part in parts:
        assert part in sentence


def test_block_causal_masks_need_a_tokenizer_that_ends_its_texts(tmp_path, capfd, no_process_group):
    shutil.copy(SHIPPED_TOKENIZER / "tokenizer.json", tmp_path)  # names no special tokens itself
    assert load_tokenizer(str(tmp_path)).eos_id is None
    options = [f"--model.hf_assets_path={tmp_path}", "--model.args.attn_mask_type=block_causal"]
    assert main([*tiny(tmp_path), *options]) == 2
    assert "'block_causal' needs a tokenizer with an end-of-text token" in sentence_of(capfd)


def test_data_that_turns_out_to_be_useless_is_told_the_same_way(tmp_path, capfd):
    """Documents are read after the processes have met; the exit code is the same."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"txet": "a text under the wrong key"}) + "\n")
    options = ["--training.dataset=text", f"--training.dataset_path={data}"]
    assert main([*tiny(tmp_path), *options]) == 2
    sentence = sentence_of(capfd)
    assert "no usable document" in sentence and "training.dataset_text_key" in sentence
    assert not dist.is_initialized(), "the process group is left even so"


def test_help_names_every_key_and_exits_with_0(capfd, no_process_group):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code in (0, None)
    text = capfd.readouterr().out
    assert [key for key in KEYS if f"--{key} " not in text and f"--{key}," not in text] == []


def test_check_config_checks_and_does_not_train(tmp_path, capfd, no_process_group):
    folder = tmp_path / "outputs"
    assert main([*tiny(folder), "--job.check_config"]) == 0
    assert not folder.exists() and capfd.readouterr().out.startswith("The config fits: 1 process,")
    assert main([*tiny(folder), "--job.check_config", "--model.flavor=debugmodle"]) == 2
    assert "debugmodle" in sentence_of(capfd)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="3 processes on this machine need a GPU each, .* sees 2:"):
        check_local_processes(3)
    check_local_processes(2)
