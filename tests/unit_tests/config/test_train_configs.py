"""The shipped TOMLs are good ones, for as many processes as their first lines say."""

from pathlib import Path

import pytest

from torchtitan.config import ConfigManager, validate
from torchtitan.protocols.train_spec import get_flavor, get_train_spec

FOLDER = Path(__file__).parents[3] / "train_configs"


@pytest.mark.parametrize(
    "name, processes",
    [("debug_model", 2), ("deepseek_v3_16b", 8), ("moonlight_16b_a3b", 8)],
)
def test_a_shipped_config_is_accepted(name, processes):
    config = ConfigManager().parse_args(["--job.config_file", str(FOLDER / f"{name}.toml")])
    validate(config, processes)
    spec = get_train_spec(config.model.name)
    args = get_flavor(spec, config.model.name, config.model.flavor).for_run(
        overrides=config.model.args, seq_len=config.training.seq_len
    )
    args.check_expert_parallel(config.parallelism.expert_parallel_degree)
    if config.checkpoint.last_save_in_hf:
        spec.state_dict_adapter(args).check_export()
