"""Does once, in the process that all others are forks of (helpers.py), what each would do first:
import what is imported late, and read options (tyro's backend comes with the first ones)."""
# ruff: noqa: F401

import torch._inductor.compile_fx  # for compiled runs
import torch.distributed.run  # for launchers
import torch.utils.serialization
import torchdata.stateful_dataloader
import typeguard  # tyro

import tests.distributed_tests.training_ranks
import torchtitan.distributed.nodes
import torchtitan.train
from torchtitan.config import ConfigManager

ConfigManager().parse_args(["--training.steps=1"])
