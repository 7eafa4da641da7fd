"""Plan of a proof: the user's world, the worlds that stand for it, and the pairs that none has.

Errors in the config or the world size are found here, before any process.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torchtitan.components.finetuning.trained import make_whole_model
from torchtitan.components.huggingface.sizes import without_folder
from torchtitan.components.optimizer.param_groups import check_groups
from torchtitan.config import JobConfig, validate
from torchtitan.config.phases import coefficients_set
from torchtitan.models.decoder import DecoderArgs
from torchtitan.proof.short_data import short_data
from torchtitan.proof.shrink import reference, shrink
from torchtitan.proof.worlds import Axes, World, world_of, worlds_for
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.trainer.preflight import check_pipeline, model_args_of


@dataclass(frozen=True)
class Run:
    """A world to start.

    small: its config.
    alone: config of the same run on one process.
    """

    world: World
    small: JobConfig
    alone: JobConfig


@dataclass(frozen=True)
class Plan:
    """Worlds that prove a run.

    config: of the user's run.
    args: its model arguments.
    whole: its world.
    missing: axes and pairs that no run has.
    replaced: sentences on data that is not here.
    """

    config: JobConfig
    args: BaseModelArgs
    whole: World
    runs: list[Run]
    missing: set[Axes]
    replaced: list[str]


def make_plan(
    config: JobConfig, world_size: int | None, *, node_size: int, most: int, folder: Path
) -> Plan:
    """Plan a proof. Raises `UserError`.

    world_size: processes of the user's run, None = the fewest that its degrees allow.
    node_size: processes of a machine, where the TOML doesn't say it.
    most: processes to start at once.
    folder: for the data.
    """
    config = replace(config, comm=replace(config.comm, mode="default"))
    whole = world_of(config, world_size, node_size)
    validate(config, whole.size, "cuda")
    spec = get_train_spec(config.model.name)
    args = model_args_of(config, spec, config.training.seq_len)
    config = without_folder(config, spec, args)
    if not isinstance(args, DecoderArgs):
        raise UserError(
            f"model.name '{config.model.name}' is no decoder of models/decoder, the only kind that "
            "this knows how to shrink; name another family."
        )
    args.check_coefficients(coefficients_set(config.schedule.phase))
    args.check_layout(config.parallelism)
    check_pipeline(config, args)
    check_groups(config.optimizer.group, make_whole_model(spec, args, config))
    worlds, missing = worlds_for(whole, config.parallelism, most)
    training, replaced = short_data(config.training, folder)
    local = replace(config, training=training)
    runs = []
    for world in worlds:
        small = shrink(local, args, whole, world)
        runs.append(Run(world, small, reference(small, world)))
    return Plan(config, args, whole, runs, missing, replaced)
