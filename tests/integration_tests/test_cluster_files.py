"""The files for schedulers: each calls run_train.sh once a node, with variables that it reads.

Schedulers and run_train.sh are stubs here; tests/fault_tests/test_nodes.py has a real run.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from tests.pages import REPO
from tests.scripts import script
from torchtitan.config import ConfigManager

SLURM = REPO / "scripts/multinode_trainer.slurm"
# Variables of run_train.sh by its own header.
KNOWN = set(re.findall(r"^# +([A-Z_]+) ", (REPO / "run_train.sh").read_text(), re.MULTILINE))
NOTE = """#!/bin/bash
names='NNODES|NODE_RANK|NODE_NAMES|MASTER_ADDR|MASTER_PORT|NGPU|STOP_CODE|CONFIG_FILE|MAX_RESTARTS'
env | grep -E "^($names)=" >"called.$NODE_RANK"
printf '%s\\n' "$@" >"arguments.$NODE_RANK"
exit "${CODE:-0}"
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with a run_train.sh that notes how it was called."""
    write(tmp_path / "run_train.sh", NOTE)
    (tmp_path / "bin").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def bash(folder: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name not in KNOWN}
    env |= variables | {"PATH": f"{folder / 'bin'}:{env['PATH']}"}
    return subprocess.run(["bash", *command], cwd=folder, env=env, capture_output=True, text=True)


def called(folder: Path, node: int) -> dict[str, str]:
    lines = (folder / f"called.{node}").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


# ---------------------------------------------------------------------------------------------
# Slurm
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def sbatch(folder):
    """Runs the script as Slurm would on three nodes; `requeued` is there where it asked for it."""
    write(
        folder / "bin/scontrol",
        "#!/bin/bash\n"
        'case $1 in show) printf "gpu-%s\\n" 4 5 6 ;; requeue) echo "$2" >requeued ;; esac\n',
    )
    write(
        folder / "bin/srun",
        "#!/bin/bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        'for n in 0 1 2; do SLURM_NODEID=$n SLURM_PROCID=$n "$@" || code=$?; done\n'
        "exit ${code:-0}\n",
    )
    write(folder / "bin/squeue", '#!/bin/bash\necho "$STATE"\n')

    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        of_slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "gpu-[4-6]"}
        of_slurm |= {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "1234567", "STATE": "RUNNING"}
        return bash(folder, SLURM, *arguments, **of_slurm | variables)

    return call


def test_slurm_starts_one_launcher_on_each_node(sbatch, folder):
    done = sbatch("--job.description", "two words", SLURM_GPUS_ON_NODE="8", CONFIG_FILE="X.toml")
    assert done.returncode == 0, done.stderr
    for node in range(3):
        expected = {"NNODES": "3", "NODE_RANK": str(node), "MASTER_ADDR": "gpu-4", "NGPU": "8"}
        expected |= {"MASTER_PORT": "24567", "NODE_NAMES": "gpu-4 gpu-5 gpu-6 "}
        expected |= {"STOP_CODE": "75", "CONFIG_FILE": "X.toml"}
        assert called(folder, node) == expected
        arguments = (folder / f"arguments.{node}").read_text().splitlines()
        assert arguments == ["--job.description", "two words"]
    assert not (folder / "requeued").exists()


@pytest.mark.parametrize(
    "code, state, requeued",
    [("75", "RUNNING", True), ("75", "COMPLETING", False), ("1", "RUNNING", False)],
)
def test_slurm_requeues_what_a_signal_has_ended(sbatch, folder, code, state, requeued):
    assert sbatch(CODE=code, STATE=state).returncode == int(code)
    assert (folder / "requeued").exists() == requeued


def test_slurm_outside_of_the_repository_is_refused(sbatch, folder):
    done = sbatch(SLURM_SUBMIT_DIR=str(folder / "bin"))
    assert done.returncode == 2 and "has no run_train.sh: call sbatch in the repos" in done.stderr


@pytest.mark.parametrize("file", [SLURM, REPO / "run_train.sh"], ids=lambda file: file.name)
def test_shellcheck_finds_nothing(file):
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("bash reads it; shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-e", "SC1091", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------
# Kubernetes, SkyPilot, torchx
# ---------------------------------------------------------------------------------------------


def test_kubernetes_pods_call_run_train_with_variables_that_it_reads():
    text = (REPO / "scripts/kubernetes/train.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert set(values) - KNOWN == set() and container["command"] == ["./run_train.sh"]
    assert int(values["NNODES"]) == spec["completions"] == spec["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert values["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    config = ["--job.config_file", str(REPO / values["CONFIG_FILE"]), *container["args"]]
    dump_folder = ConfigManager().parse_args(config).job.dump_folder
    assert dump_folder in [mount["mountPath"] for mount in container["volumeMounts"]]
    by_code = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {2: "FailJob", int(values["STOP_CODE"]): "Ignore"}
    assert pod["restartPolicy"] == "Never", "which a podFailurePolicy needs"


def test_skypilot_calls_run_train_on_each_node(folder):
    task = yaml.safe_load((REPO / "scripts/skypilot.yaml").read_text())
    assert set(task["envs"]) - KNOWN == set() and (REPO / task["envs"]["CONFIG_FILE"]).exists()
    assert bash(folder, "-n", "-c", task["setup"]).returncode == 0
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    given |= {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5"}
    done = bash(folder, "-c", task["run"], **given)
    assert done.returncode == 0, done.stderr
    expected = {"NNODES": "2", "NODE_RANK": "1", "NGPU": "8", "MASTER_ADDR": "10.0.0.4"}
    assert called(folder, 1) == expected | {"NODE_NAMES": "10.0.0.4 10.0.0.5 "}
    arguments = (folder / "arguments.1").read_text().split()
    assert arguments == [f"--job.dump_folder={path}" for path in task["file_mounts"]]


@pytest.fixture
def torchx_train(monkeypatch):
    """The component, on torchx where it is installed, else on its data classes' names."""
    try:
        import torchx.specs  # noqa: F401
    except ImportError:
        specs = types.ModuleType("torchx.specs")
        fields = ["name", "image", "entrypoint", "args", "env", "num_replicas", "resource"]
        macros = types.SimpleNamespace(replica_id="${replica_id}", rank0_env="${rank0_env}")
        specs.__dict__.update(
            macros=macros,
            Role=dataclasses.make_dataclass("Role", fields),
            AppDef=dataclasses.make_dataclass("AppDef", ["name", "roles"]),
            Resource=dataclasses.make_dataclass("Resource", ["cpu", "gpu", "memMB"]),
        )
        package = types.ModuleType("torchx")
        package.__dict__["specs"] = specs
        monkeypatch.setitem(sys.modules, "torchx", package)
        monkeypatch.setitem(sys.modules, "torchx.specs", specs)
    return script("torchx_train.py")


def test_torchx_calls_run_train_on_each_node(torchx_train, folder):
    app = torchx_train.train("--training.steps=3", nodes=4, config="X.toml", gpus=8)
    (role,) = app.roles
    assert role.num_replicas == 4 and set(role.env) - KNOWN == set()
    env = {name: value.replace("${replica_id}", "2") for name, value in role.env.items()}
    words = [word.replace("${rank0_env}", "FIRST_HOST") for word in role.args]
    done = bash(folder, *words, FIRST_HOST="gpu-4", **env)
    assert done.returncode == 0, done.stderr
    expected = {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "gpu-4", "MASTER_PORT": "29500"}
    expected |= {"NGPU": "8", "CONFIG_FILE": "X.toml", "MAX_RESTARTS": "0"}
    assert called(folder, 2) == expected
    assert (folder / "arguments.2").read_text() == "--training.steps=3\n"
