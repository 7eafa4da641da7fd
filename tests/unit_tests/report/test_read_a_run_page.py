"""docs/read_a_run.md has every number that a run writes, under its curve, and no other."""

import inspect
import re

import pytest
import torch

from tests.pages import REPO
from tests.tiny_run import as_option, records, tiny
from torchtitan.components.metrics import waiting
from torchtitan.components.metrics.expert_traffic import traffic_numbers
from torchtitan.components.metrics.names import CURVES, curve
from torchtitan.train import main

PAGE = (REPO / "docs/read_a_run.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| (?:image )?`([^`]+)` \|", re.MULTILINE)
ON_THE_PAGE = dict(ROW.findall(PAGE))
# A device tells these, which this test has none of.
OF_CUDA = {"memory_active_gib", "mfu_percent"}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> set[str]:
    """Names in the records of a run with everything on, and of what one CPU process doesn't do."""
    folder = tmp_path_factory.mktemp("run")
    blend = [
        {"name": "web", "weight": 1.0, "dataset": "sample"},
        {"name": "chat", "weight": 1.0, "dataset": "chat_sample", "format": "chat"},
    ]
    phases = [{"tokens": 10_000, "lr": 0.01}]
    options = tiny(
        folder,
        training__steps=2,
        metrics__log_routing="true",
        metrics__routing_moved_freq=2,
        validation__enable="true",
        validation__seq_len=64,
        training__seq_len=64,
        model__args__attn_mask_type="block_causal",
        validation__steps=1,
        model__args__n_mtp_layers=1,
        model__args__moe_args__num_expert_groups=4,
        model__args__moe_args__num_limited_groups=2,
    )
    options.remove("--training.dataset=sample")  # the blend replaces it
    sets = [{"name": "talk", "dataset": "chat_sample", "format": "chat"}]
    options.append(as_option(sets, "validation.sets"))
    assert main([*options, as_option(blend, "training.blend"), as_option(phases)]) == 0
    names = {name for record in records(folder) for name in record}
    names |= set(traffic_numbers({1: torch.ones(2, 3, dtype=torch.int64)}, 1))
    names |= set(re.findall(r'"(\w+)": ', inspect.getsource(waiting.WaitProfile._share)))
    return names | OF_CUDA | {"cross_node_percent"}


def test_every_number_of_a_run_is_on_the_page(written):
    plain = {name for name in written if not name.startswith("layer_")}
    layers = {name.removeprefix("layer_") for name in written if name.startswith("layer_")}
    assert plain - {"step", "time"} - set(ON_THE_PAGE) == set()
    assert layers - {"expert_load"} - set(ON_THE_PAGE) == set()


def test_every_number_of_the_page_is_one_that_a_run_writes(written):
    assert set(ON_THE_PAGE) - written == set()


def test_the_page_names_the_curves_as_they_are():
    found = {name: shown for name, shown in ON_THE_PAGE.items() if name != "layer_expert_load"}
    found = {name: re.sub(r"/<(dataset|set)>$", "", shown) for name, shown in found.items()}
    assert found == {name: curve(name) for name in found}
    assert set(CURVES) - set(found) == {"expert_load"}
