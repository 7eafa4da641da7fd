"""Every command of README and docs: run here at toy size, by another test, or its words checked.

A command that is in none of the three tables fails.
"""

import runpy
import shlex
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.pages import PAGES, REPO, commands
from tests.tiny_run import TINY, tiny
from torchtitan.config import ConfigManager, validate
from torchtitan.config.schema import KEYS
from torchtitan.train import main

TRAIN = "python -m torchtitan.train"
BENCH = "python scripts/bench.py"
CONVERSION = "python scripts/checkpoint_conversion"
DEBUG_TOML = str(REPO / "train_configs/debug_model.toml")
SCHEDULERS = ("sbatch", "kubectl", "sky", "torchx")
TOY = [f"--{key}={value}" for key, value in TINY.items()]
EAGER = ["--compile.enable=false"]


class Shrunk(NamedTuple):
    """How a command is made small: words replaced, then words added, of which the last holds."""

    replace: dict[str, str]
    add: list[str]


# In the order in which they run, each page in a folder of its own.
RUN_HERE = {
    f"{TRAIN} --job.config_file X.toml --section.key value": Shrunk(
        {"X.toml": DEBUG_TOML, "--section.key": "--job.description", "value": "toy"},
        [*TOY, "--training.steps=2"],
    ),
    f"{TRAIN} --job.config_file X.toml --job.check_config": Shrunk({"X.toml": DEBUG_TOML}, []),
    f"{TRAIN} --help": Shrunk({}, []),
    f"{CONVERSION}/convert_to_hf.py outputs/checkpoint/step-1000 my-model "
    "--assets assets/hf/DeepSeek-V3 [--dtype bfloat16] [--fp8]": Shrunk(
        {
            "step-1000": "step-1",
            "assets/hf/DeepSeek-V3": str(REPO / "tests/assets/tokenizer"),
            "[--dtype bfloat16] [--fp8]": "--dtype bfloat16",
        },
        [],
    ),
    f"{CONVERSION}/convert_from_hf.py assets/hf/DeepSeek-V3 outputs/deepseek-v3": Shrunk(
        {"assets/hf/DeepSeek-V3": "my-model"}, []
    ),
    'python scripts/generate.py outputs/checkpoint/step-1000 --prompt "Once upon a time" '
    '--prompt "2 + 2 ="': Shrunk({"step-1000": "step-1"}, ["--max_new_tokens=2"]),
    f"{TRAIN} --model.flavor 16B --model.args.n_layers 8 --training.seq_len 4096 "
    "--training.local_batch_size 4 --training.steps 14 --lr_scheduler.warmup_steps 2 "
    "--metrics.log_freq 1 --activation_checkpoint.mode none "
    "--model.args.moe_args.load_balance_coeff 0.001 --compile.enable": Shrunk(
        {}, [*TOY, *EAGER, "--training.steps=2"]
    ),
    f"{TRAIN} --model.flavor 16B --model.args.n_layers 8 --training.seq_len 4096 "
    "--training.local_batch_size 4 --training.dataset_num_workers 1 "
    "--activation_checkpoint.mode none --model.args.moe_args.load_balance_coeff 0.001 "
    "--compile.enable": Shrunk({}, [*TOY, *EAGER, "--training.steps=2"]),
    f"{BENCH} step --job.config_file train_configs/debug_model.toml": Shrunk(
        {"train_configs/debug_model.toml": DEBUG_TOML},
        [*TOY, "--warmup=1", "--steps=1", "--no_breakdown"],
    ),
    f"{BENCH} presets": Shrunk({}, []),
}

_SCRIPT = "tests/integration_tests/test_run_train.py::"
_NODES = "test_the_debug_model_with_everything_a_toml_offers_trains_like_one_process"
_EXPERTS = "--parallelism.expert_parallel_degree 4 --parallelism.expert_parallel_node_size 1"
_PLAN = "tests/unit_tests/planning/test_plan.py::test_report_page_and_data_say_the_same"
_REPORT = "tests/unit_tests/report/test_report.py::"
_CHAT = "tests/integration_tests/test_chat.py::"
_ADAPTERS = (
    "tests/distributed_tests/test_finetuning_runs.py::"
    "test_a_run_writes_what_its_checkpoint_converts_to"
)
_CONTRACT = "tests/distributed_tests/test_loss_contract.py::"
RUN_BY_ANOTHER_TEST = {
    "./run_train.sh": f"{_SCRIPT}test_a_file_written_for_torchtitan_v02_runs_at_once",
    "LOG_RANK=0,1 ./run_train.sh": _SCRIPT + _NODES,
    "COMM_MODE=fake_backend NGPU=256 ./run_train.sh --training.steps 1": (
        f"{_SCRIPT}test_the_fake_backend_is_a_dry_run_of_one_of_64_ranks"
    ),
    f"NGPU=4 ./run_train.sh --model.flavor debugmodel_node_limited {_EXPERTS}": _SCRIPT + _NODES,
    "NGPU=4 ./run_train.sh --model.flavor debugmodel_node_limited --metrics.log_traffic "
    f"{_EXPERTS}": _SCRIPT + _NODES,
    "python scripts/card.py 16B": (
        "tests/unit_tests/cards/test_cards.py::"
        "test_the_script_writes_the_card_and_fails_with_a_check"
    ),
    "python scripts/from_torchtitan.py OLD.toml -o NEW.toml": (
        "tests/unit_tests/config/test_from_torchtitan.py::test_v01"
    ),
    "python scripts/plan.py train_configs/deepseek_v3_671b.toml --world-size 2048 --hardware "
    "h800": _PLAN,
    "python scripts/plan.py X.toml --world-size 2048 --hardware h800": _PLAN,
    "python scripts/plan.py X.toml --world-size 64 --hardware h200 --sweep --html plan.html "
    "--json plan.json --tokens 1e12 --activation_checkpoint.mode full": _PLAN,
    "python scripts/prove.py train_configs/deepseek_v3_671b.toml --world-size 2048": (
        "tests/unit_tests/proof/test_shrink.py::test_shipped_files_shrink_to_runs_that_are_legal"
    ),
    "python scripts/report.py outputs": f"{_REPORT}test_the_page_has_everything_that_was_recorded",
    "python scripts/report.py RUN_A RUN_B --out both.html": (
        f"{_REPORT}test_runs_beside_each_other_have_their_curves_and_what_differs"
    ),
    "python scripts/explain_hang.py outputs/comm_traces": (
        "tests/unit_tests/tools/test_flight_recorder.py::test_the_script_prints_the_sentence"
    ),
    "python scripts/show_batch.py train_configs/chat_debug_model.toml": (
        f"{_CHAT}test_show_batch_marks_what_is_trained"
    ),
    "CONFIG_FILE=train_configs/chat_debug_model.toml ./run_train.sh": (
        f"{_CHAT}test_it_answers_word_for_word_in_several_turns"
    ),
    "python scripts/generate.py outputs/checkpoint/step-150 --chat --temperature 0 "
    '--prompt "Tell me about memory." --prompt "And disks?"': (
        f"{_CHAT}test_it_answers_word_for_word_in_several_turns"
    ),
    f"{CONVERSION}/convert_to_hf.py outputs/checkpoint/step-1000 my-adapter "
    "--assets assets/hf/Moonlight-16B-A3B": _ADAPTERS,
    f"{CONVERSION}/convert_to_hf.py outputs/checkpoint/step-1000 my-model --merged "
    "--assets assets/hf/Moonlight-16B-A3B": _ADAPTERS,
    "NGPU=2 ./run_train.sh --metrics.log_freq 1": (
        f"{_CONTRACT}test_the_debug_model_repeats_its_committed_losses"
    ),
}

_CLUSTER = "tests/integration_tests/test_cluster_files.py::test_"
_OF_16B = "train_configs/deepseek_v3_16b.toml"
RUN_BY_ANOTHER_TEST |= {
    f"CONFIG_FILE={_OF_16B} sbatch --nodes 4 scripts/multinode_trainer.slurm "
    "--training.steps 1000": f"{_CLUSTER}slurm_starts_one_launcher_on_each_node",
    "kubectl apply -f scripts/kubernetes/train.yaml": (
        f"{_CLUSTER}kubernetes_pods_call_run_train_with_variables_that_it_reads"
    ),
    "sky jobs launch --num-nodes 4 scripts/skypilot.yaml": (
        f"{_CLUSTER}skypilot_calls_run_train_on_each_node"
    ),
    f"torchx run -s slurm scripts/torchx_train.py:train --nodes 4 --config {_OF_16B} -- "
    "--training.steps 1000": f"{_CLUSTER}torchx_calls_run_train_on_each_node",
}

_GPUS = "needs GPUs"
_NETWORK = "needs the network"
NOT_RUN_BECAUSE = {
    "./scripts/test.sh": "is what runs this test",
    "NGPU=8 CONFIG_FILE=train_configs/deepseek_v3_16b.toml ./run_train.sh "
    "--training.steps 100": _GPUS,
    "python scripts/download_hf_assets.py moonshotai/Moonlight-16B-A3B": _NETWORK,
    "python scripts/download_hf_assets.py moonshotai/Moonlight-16B-A3B --weights": _NETWORK,
    "torchrun --nproc-per-node 8 scripts/generate.py assets/hf/DeepSeek-V3 "
    '--prompt "Once upon a time"': _GPUS,
    "OMP_NUM_THREADS=2 python scripts/bench.py step --peers transformers "
    "--preset cpu-fp32-s2048 cpu-bf16-s2048 cpu-fp32-s512 cpu-bf16-s512": "takes minutes",
    f"{BENCH} step --preset 16b8-b4-fp32 16b8-b8-fp32 --out rows.json": _GPUS,
    f"{BENCH} kernels --widths 16B 671B --out kernels.json": _GPUS,
    f"{BENCH} step --preset 16b8-b4-fp32 --peers torchtitan transformers+liger "
    "--torchtitan_site peers/torchtitan": _GPUS,
    "pip install transformers liger-kernel": _NETWORK,
    "pip install --no-deps --target peers/torchtitan torchtitan==0.2.2": _NETWORK,
    "pip install einops": _NETWORK,
}


def test_every_command_is_in_one_table():
    tables = [*RUN_HERE, *RUN_BY_ANOTHER_TEST, *NOT_RUN_BECAUSE]
    assert len(set(tables)) == len(tables)
    lines = {command.line for command in commands()}
    assert lines - set(tables) == set(), "add it to a table of this file"
    assert set(tables) - lines == set(), "is no longer on any page; remove it"


@pytest.mark.parametrize("test", sorted(set(RUN_BY_ANOTHER_TEST.values())))
def test_the_other_test_is_there(test):
    path, _, name = test.partition("::")
    assert f"def {name}(" in (REPO / path).read_text()


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------


def split(line: str) -> tuple[dict[str, str], Path | None, list[str]]:
    """Variables, the program's file (None: one that is installed) and its words."""
    words = shlex.split(line.replace("[", "").replace("]", ""))
    count = next(n for n, word in enumerate(words) if "=" not in word)
    variables = dict(word.split("=", 1) for word in words[:count])
    if words[count] in ("pip", *SCHEDULERS):
        return variables, None, words[count:]
    if words[count : count + 3] == TRAIN.split():
        return variables, REPO / "torchtitan/train.py", words[count + 3 :]
    at = next(n for n in range(count, len(words)) if words[n].endswith((".py", ".sh")))
    return variables, REPO / words[at], words[at + 1 :]


@pytest.mark.parametrize("line", [*RUN_BY_ANOTHER_TEST, *NOT_RUN_BECAUSE])
def test_what_does_not_run_here_names_programs_files_and_options_that_exist(line):
    variables, program, words = split(line)
    if program is None:
        files = [word.partition(":")[0] for word in words if word.startswith("scripts/")]
        assert all((REPO / file).exists() for file in files)
        return
    assert program.exists()
    if program.name != "run_train.sh":
        sources = [program, *(REPO / "scripts/benchmarks").glob("*.py")]
        source = "".join(file.read_text() for file in sources)
        options = [word[2:] for word in words if word.startswith("--")]
        assert [name for name in options if f'"--{name}"' not in source and name not in KEYS] == []
        return
    file = REPO / variables.get("CONFIG_FILE", "train_configs/debug_model.toml")
    config = ConfigManager().parse_args([f"--job.config_file={file}", *words])
    validate(config, int(variables.get("NGPU", 2)))


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def run(line: str, monkeypatch) -> int:
    """The exit code of a command, in this process: imports take longest."""
    shrunk = RUN_HERE[line]
    for old, new in shrunk.replace.items():
        assert old in line
        line = line.replace(old, new)
    _, program, words = split(line)
    words += shrunk.add
    try:
        if line.startswith(TRAIN):
            return main(words)
        monkeypatch.setattr(sys, "argv", [str(program), *words])
        monkeypatch.syspath_prepend(program.parent)
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    raise AssertionError(f"{program} ends without an exit code")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in; what scripts set in this process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    interrupt = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, interrupt)


@pytest.mark.parametrize("page", [str(page.relative_to(REPO)) for page in PAGES])
def test_the_commands_of_a_page_run(page, folder, monkeypatch):
    lines = {command.line for command in commands() if command.page == page}
    if page == "docs/huggingface.md":  # begins with a run that has saved a checkpoint
        assert main(tiny(Path("outputs"), training__steps=1, checkpoint__enable="true")) == 0
    for line in RUN_HERE:
        if line in lines:
            assert run(line, monkeypatch) == 0, line
