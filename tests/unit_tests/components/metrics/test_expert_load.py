"""Numbers about the expert load by hand, in a run's records, and alarms that act."""

import logging

import pytest
import torch

from tests.tiny_run import records, tiny
from torchtitan.components.metrics.alarms import Alarms
from torchtitan.components.metrics.expert_load import (
    balance_numbers,
    cross_node_percent,
    routing_numbers,
)
from torchtitan.config import Alarm, ConfigManager, validate
from torchtitan.config.router_stats import ROUTER_STATS
from torchtitan.models.moe import router_stats
from torchtitan.tools.errors import UserError
from torchtitan.train import main

LOADS = {2: torch.tensor([4, 0, 2, 2]), 5: torch.tensor([2, 2, 2, 2])}


def test_numbers_by_hand():
    biases = {2: torch.tensor([0.5, -0.25, 0.0, 0.0]), 5: torch.zeros(4)}
    numbers = balance_numbers(LOADS, biases, num_groups=2)
    assert numbers["dead_experts"] == 1 and numbers["layer_dead_experts"] == {2: 1, 5: 0}
    assert numbers["bias_range"] == 0.75
    # Shares 1/2, 0, 1/4, 1/4: 3/2 bit of 2.
    assert numbers["layer_load_entropy"] == pytest.approx({2: 0.75, 5: 1.0})
    assert numbers["load_entropy"] == pytest.approx(0.75)
    assert numbers["layer_max_group_load"] == {2: 1.0, 5: 1.0}
    lopsided = balance_numbers({0: torch.tensor([3, 3, 1, 1])}, {0: None}, num_groups=2)
    assert lopsided["max_group_load"] == 1.5 and "bias_range" not in lopsided


def test_routing_numbers_are_means_over_tokens():
    sums = {2: torch.tensor([10.0, 40.0, 5.0, 2.0, 8.0]), 5: torch.tensor([20.0, 0, 5.0, 0, 6.0])}
    numbers = routing_numbers(sums, tokens=10, loads=LOADS)
    assert numbers["layer_router_balance_loss"] == {2: 1.0, 5: 2.0}
    assert numbers["router_balance_loss"] == 1.5 and numbers["router_z_loss"] == 2.0
    assert numbers["router_entropy"] == 0.5 and numbers["limited_percent"] == 10.0
    assert numbers["router_global_balance_loss"] == pytest.approx(0.7)
    assert numbers["layer_expert_load"][2] == [2.0, 0.0, 1.0, 1.0]


def test_cross_node_percent():
    rows = {"rows_sent_self": 1, "rows_sent_node": 1, "rows_sent_remote": 6}
    assert cross_node_percent(rows) == {"cross_node_percent": 75.0}
    assert cross_node_percent({}) == {}


def test_an_alarm_rings_after_so_many_steps_in_a_row_and_the_strongest_wins():
    alarms = Alarms(
        [
            Alarm(watch="max_violation", above=2.0, times=2),
            Alarm(watch="load_entropy", below=0.5, action="stop"),
        ]
    )
    even = {"max_violation": 1.0, "load_entropy": 1.0}
    steep = even | {"max_violation": 3.0}
    asked = [
        alarms.check(n, numbers) for n, numbers in enumerate((steep, even, steep, steep, even))
    ]
    assert asked == ["none", "none", "none", "warn", "none"]
    assert alarms.check(9, {"max_violation": 3.0, "load_entropy": 0.25}) == "stop"
    assert alarms.reason == "step 9: alarm: load_entropy = 0.25 is below 0.5"


# ---------------------------------------------------------------------------------------------
# In a run
# ---------------------------------------------------------------------------------------------

LIMITED = "--model.flavor=debugmodel_node_limited"


def test_a_run_records_what_its_routers_do(tmp_path):
    options = [LIMITED, "--metrics.log_routing", "--metrics.enable_tensorboard"]
    assert main([*tiny(tmp_path, training__steps=2), *options]) == 0
    for record in records(tmp_path):
        assert record["router_balance_loss"] == pytest.approx(1.0, abs=0.2)
        assert 0.9 < record["router_entropy"] <= 1.0 and 0 < record["limited_percent"] < 100
        assert len(record["layer_expert_load"]["1"]) == 8
        assert record["max_group_load"] >= 1.0
    # One update of +-0.001, less its mean.
    assert records(tmp_path)[0]["bias_range"] == pytest.approx(0.002, rel=1e-3)


def test_a_statistic_is_logged_and_watched_once_it_stands_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTER_STATS, "chosen_percent", 100.0)
    monkeypatch.setitem(router_stats.FUNCTIONS, "chosen_percent", chosen)
    watch = '--metrics.alarm=[{watch="chosen_percent", above=100.0, action="stop"}]'
    assert main([*tiny(tmp_path, training__steps=2), "--metrics.log_routing", watch]) == 1
    (record,) = records(tmp_path)
    assert record["chosen_percent"] == 300.0 and record["layer_chosen_percent"] == {"1": 300.0}
    assert record["router_balance_loss"] == pytest.approx(1.0, abs=0.2)


def chosen(routed: router_stats.RoutedTokens) -> torch.Tensor:
    """The number of chosen experts, 3 a token: a sum by hand."""
    return torch.tensor(float(routed.ids_TK.numel()))


def test_every_statistic_of_the_table_has_its_function():
    assert set(ROUTER_STATS) == set(router_stats.FUNCTIONS)


def alarm(action: str, times: int = 2) -> str:
    return f'--metrics.alarm=[{{watch="loss", above=1.0, times={times}, action="{action}"}}]'


def test_an_alarm_that_stops_saves_first_and_ends_with_code_1(tmp_path, caplog):
    options = ["--checkpoint.enable", alarm("stop")]
    assert main([*tiny(tmp_path, training__steps=6), *options]) == 1
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-2"]


def test_an_alarm_that_warns_lets_the_run_go_on(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="torchtitan")
    assert main([*tiny(tmp_path, training__steps=3), alarm("warn", times=1)]) == 0
    assert len(records(tmp_path)) == 3


@pytest.mark.parametrize(
    "table, sentence",
    [
        ("watch='max_vio', above=1", "not a number that an alarm can watch; did you mean 'max_vio"),
        ("watch='router_entropy', below=1", "only with metrics.log_routing = true"),
        ("watch='loss'", "set above, below or both"),
        ("watch='loss', above=1, times=0", "times = 0 must be 1 or more"),
        ("watch='loss', above=1, action='checkpoint'", "needs checkpoint.enable = true"),
    ],
)
def test_an_alarm_that_can_not_ring_is_refused(table, sentence):
    config = ConfigManager().parse_args([f"--metrics.alarm=[{{{table}}}]"])
    with pytest.raises(UserError, match=r"metrics\.alarm 1.*" + sentence):
        validate(config, 1)
