"""Train with torchx: run_train.sh once on each node (docs/cluster.md).

    torchx run -s slurm scripts/torchx_train.py:train --nodes 4 -- --training.steps 1000

Slurm runs it in the current folder; Kubernetes and other schedulers of containers in `image`.
"""

from torchx import specs


def train(
    *overrides: str,
    nodes: int = 2,
    gpus: int = 8,
    cpu: int = 96,
    memory_mb: int = 1_000_000,
    config: str = "train_configs/debug_model.toml",
    image: str = "",
    max_restarts: int = 0,
    port: int = 29500,
) -> specs.AppDef:
    """Train on several nodes.

    Args:
        overrides: overrides of the config, such as --training.steps=20
        nodes: machines
        gpus: GPUs and processes of each; 0 for two processes on the CPU
        cpu: cores of each
        memory_mb: memory of each, in MB
        config: TOML file
        image: container image with this repository as its working folder
        max_restarts: times that a failed run begins anew by itself, from its newest checkpoint
        port: a free port of the first machine
    """
    # The scheduler sets a variable, whose name torchx knows, to the first machine's address.
    command = f'MASTER_ADDR="${{{specs.macros.rank0_env}:=localhost}}" exec ./run_train.sh "$@"'
    env = {
        "NNODES": str(nodes),
        "NODE_RANK": specs.macros.replica_id,
        "MASTER_PORT": str(port),
        "NGPU": str(gpus or 2),
        "CONFIG_FILE": config,
        "MAX_RESTARTS": str(max_restarts),
    }
    role = specs.Role(
        name="train",
        image=image,
        entrypoint="bash",
        args=["-c", command, "run_train.sh", *overrides],
        env=env,
        num_replicas=nodes,
        resource=specs.Resource(cpu=cpu, gpu=gpus, memMB=memory_mb),
    )
    return specs.AppDef(name="torchtitan", roles=[role])
