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

from tests.pages import PAGES, REPO, blocks, commands
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
# A shipped TOML for eight GPUs, on one process without its tokenizer, data and vocabulary.
ONE_PROCESS = [
    *TOY,
    *EAGER,
    "--training.steps=2",
    "--training.dataset_num_workers=0",
    "--training.global_batch_size=8",
    "--parallelism.expert_parallel_degree=1",
    "--model.hf_assets_path=./tests/assets/tokenizer",
    "--model.args.vocab_size=2048",
]


def without(*keys: str) -> list[str]:
    """The options of a toy run but these."""
    return [option for option in TOY if option[2:].partition("=")[0] not in keys]


class Shrunk(NamedTuple):
    """How a command is made small: words replaced, then words added, of which the last holds."""

    replace: dict[str, str]
    add: list[str]


# In the order in which they run, each page in a folder of its own. ./run_train.sh: one process.
RUN_HERE = {
    "./run_train.sh --job.dump_folder my_run --training.dataset text --training.dataset_path "
    "my_text --validation.enable false --checkpoint.enable --checkpoint.interval 100 "
    "--checkpoint.last_save_model_only false": Shrunk(
        {}, [*without("training.dataset"), "--training.steps=2"]
    ),
    "CONFIG_FILE=my_text.toml ./run_train.sh --training.steps 400": Shrunk(  # it goes on
        {"400": "4"}, [*without("training.dataset", "training.steps")]
    ),
    'python scripts/generate.py my_run/checkpoint/step-280 --prompt "Once upon a time"': Shrunk(
        {"step-280": "step-4"}, []
    ),
    "python scripts/report.py my_run": Shrunk({}, []),
    "./run_train.sh --training.steps 20 --job.dump_folder /tmp/out": Shrunk(
        {"20": "2", "/tmp/out": "outputs"}, [*without("training.steps"), "--validation.no_enable"]
    ),
    "NGPU=8 CONFIG_FILE=train_configs/deepseek_v3_16b.toml ./run_train.sh --checkpoint.enable": (
        Shrunk({}, ONE_PROCESS)
    ),
    "NGPU=1 CONFIG_FILE=train_configs/deepseek_v3_16b.toml ./run_train.sh "
    "--parallelism.expert_parallel_degree 1 --training.global_batch_size -1 "
    "--training.dtype bfloat16 --optimizer.early_step_in_backward --training.max_norm inf "
    "--activation_checkpoint.mode none": Shrunk(
        {},
        [
            *ONE_PROCESS,
            "--training.mixed_precision_param=bfloat16",
            "--training.global_batch_size=-1",
            "--job.dump_folder=one_card",
        ],
    ),
    "NGPU=8 CONFIG_FILE=train_configs/moonlight_16b_a3b.toml ./run_train.sh": Shrunk(
        {}, [*ONE_PROCESS, "--checkpoint.initial_load_path=published", "--job.dump_folder=run"]
    ),
    'python scripts/generate.py assets/hf/Moonlight-16B-A3B --prompt "Once upon a time" '
    "--temperature 0": Shrunk({"assets/hf/Moonlight-16B-A3B": "published"}, []),
    f"{CONVERSION}/convert_to_hf.py outputs/checkpoint/step-1000 my-model "
    "--assets assets/hf/Moonlight-16B-A3B": Shrunk(
        {
            "step-1000": "step-1",
            "assets/hf/Moonlight-16B-A3B": str(REPO / "tests/assets/tokenizer"),
        },
        [],
    ),
    'python scripts/generate.py my-model --prompt "Once upon a time" --temperature 0': Shrunk(
        {}, []
    ),
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
    '--prompt "2 + 2 ="': Shrunk({"step-1000": "step-1"}, []),
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
_NETWORKS = (
    "tests/unit_tests/planning/test_dispatchers.py::"
    "test_exchange_takes_as_long_as_its_copies_need_on_the_links"
)
_REPORT = "tests/unit_tests/report/test_report.py::"
_CHAT = "tests/integration_tests/test_chat.py::"
_ADAPTERS = (
    "tests/distributed_tests/test_finetuning_runs.py::"
    "test_a_run_writes_what_its_checkpoint_converts_to"
)
_WRITTEN = "tests/integration_tests/test_written_pages.py::"
_CONTRACT = "tests/distributed_tests/test_loss_contract.py::"
RUN_BY_ANOTHER_TEST = {
    "./run_train.sh": f"{_SCRIPT}test_a_file_written_for_torchtitan_v02_runs_at_once",
    "LOG_RANK=0,1 ./run_train.sh": _SCRIPT + _NODES,
    "COMM_MODE=fake_backend NGPU=256 ./run_train.sh --training.steps 1": (
        f"{_SCRIPT}test_the_fake_backend_is_a_dry_run_of_one_of_64_ranks"
    ),
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
    "python scripts/plan.py train_configs/deepseek_v3_16b.toml --world-size 8 --hardware h200": (
        _PLAN
    ),
    "python scripts/plan.py X.toml --world-size 64 --hardware h200 --sweep --html plan.html "
    "--json plan.json --tokens 1e12 --activation_checkpoint.mode full": _PLAN,
    "python scripts/plan.py train_configs/deepseek_v3_671b.toml --world-size 2048 --hardware "
    "h200 --phase 0 --network-gbits 50 100 400": _NETWORKS,
    "python scripts/plan.py train_configs/moonlight_16b_a3b.toml --world-size 16 --hardware h200 "
    "--parallelism.expert_parallel_degree 16 --network-gbits 50 100 400": _NETWORKS,
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
    "python scripts/generate.py outputs/chat/checkpoint/step-150 --chat --temperature 0 "
    '--prompt "Tell me about memory." --prompt "And disks?"': (
        f"{_CHAT}test_it_answers_word_for_word_in_several_turns"
    ),
    f"{CONVERSION}/convert_to_hf.py outputs/moonlight_16b_a3b_lora/checkpoint/step-1000 "
    "my-adapter --assets assets/hf/Moonlight-16B-A3B": _ADAPTERS,
    f"{CONVERSION}/convert_to_hf.py outputs/moonlight_16b_a3b_lora/checkpoint/step-1000 "
    "my-model --merged --assets assets/hf/Moonlight-16B-A3B": _ADAPTERS,
    "python scripts/write_command_docs.py": f"{_WRITTEN}test_the_page_is_written_from_the_code",
    "python scripts/write_code_index.py": f"{_WRITTEN}test_the_page_is_written_from_the_code",
    "python scripts/write_config_docs.py": (
        "tests/unit_tests/config/test_config_docs.py::test_the_page_is_written_from_the_dataclasses"
    ),
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
_THIS = "is what runs this test"
_SERVER = "needs a server of its own, and a GPU"
NOT_RUN_BECAUSE = {
    "./scripts/test.sh": _THIS,
    "./scripts/test.sh tests/unit_tests/models -x -q": _THIS,
    "./scripts/test.sh tests/unit_tests/config -x -q": _THIS,
    "NGPU=8 CONFIG_FILE=train_configs/deepseek_v3_16b.toml ./run_train.sh "
    "--training.steps 100": _GPUS,
    "NGPU=8 CONFIG_FILE=train_configs/deepseek_v3_16b.toml ./run_train.sh --checkpoint.enable "
    "--training.local_batch_size 2": _GPUS,
    "vllm serve my-model": _SERVER,
    "python -m sglang.launch_server --model-path my-model": _SERVER,
    "python scripts/download_hf_assets.py deepseek-ai/DeepSeek-V2-Lite": _NETWORK,
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
    if words[count] == "vllm" or words[count + 1 : count + 2] == ["-m"]:
        return variables, None, words[count:]
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
    variables, program, words = split(line)
    words += shrunk.add
    try:
        if line.startswith(TRAIN):
            return main(words)
        if program.name == "run_train.sh":
            file = variables.get("CONFIG_FILE", DEBUG_TOML)
            file = str(REPO / file) if file.startswith("train_configs/") else file
            return main(["--job.config_file", file, *words])
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


def make_checkpoint(**settings):
    assert (
        main(tiny(Path("outputs"), training__steps=1, checkpoint__enable="true", **settings)) == 0
    )


def make_published_weights():
    """A folder as one has downloaded it."""
    sizes = {"model__flavor": "Moonlight-16B-A3B", "model__args.vocab_size": 2048}
    make_checkpoint(**sizes, checkpoint__last_save_in_hf="true")
    Path("outputs/checkpoint/step-1-hf").rename("published")


def make_texts():
    Path("my_text").mkdir()
    for n in range(8):
        Path(f"my_text/{n}.txt").write_text(f"The text of file {n}. " * 50)
    (block,) = blocks(REPO / "docs/your_text.md", "toml")
    Path("my_text.toml").write_text(block)


# What is there before a page's commands.
BEFORE = {
    "docs/huggingface.md": make_checkpoint,
    "docs/export.md": make_checkpoint,
    "docs/continue_training.md": make_published_weights,
    "docs/your_text.md": make_texts,
}
# Their Python blocks run after the commands.
PYTHON_RUNS = {"docs/export.md"}


@pytest.mark.parametrize("page", [str(page.relative_to(REPO)) for page in PAGES])
def test_the_commands_of_a_page_run(page, folder, monkeypatch):
    lines = {command.line for command in commands() if command.page == page}
    if page in BEFORE:
        BEFORE[page]()
    for line in RUN_HERE:
        if line in lines:
            assert run(line, monkeypatch) == 0, line
    for block in blocks(REPO / page, "python") if page in PYTHON_RUNS else []:
        exec(compile(block, page, "exec"), {})
