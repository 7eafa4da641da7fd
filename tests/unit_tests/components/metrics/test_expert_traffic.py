"""What a log record and the console say of the dispatchers' meter."""

import pytest
import torch

from torchtitan.components.metrics.expert_traffic import traffic_line, traffic_numbers


def meter(sent: list[int], copies: list[int]) -> torch.Tensor:
    return torch.tensor([sent, copies])


def test_rows_bytes_and_savings_by_layer_and_in_all():
    layers = {1: meter([5, 6, 20], [8, 10, 80]), 2: meter([5, 4, 30], [8, 10, 70])}
    numbers = traffic_numbers(layers, bytes_per_row=1000)
    assert numbers["rows_sent_self"] == 10
    assert (numbers["rows_sent_node"], numbers["bytes_sent_node"]) == (10, 10_000)
    assert (numbers["rows_sent_remote"], numbers["bytes_sent_remote"]) == (50, 50_000)
    assert numbers["layer_bytes_sent_remote"] == {1: 20_000, 2: 30_000}
    assert numbers["traffic_saved_percent"] == pytest.approx(100 * (1 - 50 / 150))
    assert numbers["layer_traffic_saved_percent"] == pytest.approx({1: 75.0, 2: 400 / 7})
    assert numbers["traffic_saved_off_rank_percent"] == pytest.approx(100 * (1 - 60 / 170))
    assert traffic_line(numbers, tokens=10) == (
        "traffic: to other nodes 2.50 rows a token and layer (0.0 MiB), inside nodes 0.50 rows a "
        "token and layer (0.0 MiB); rows count one way, MiB all layers, dispatch and combine, "
        "forward and backward; 67% fewer rows to other nodes than with one copy per expert "
        "(layer 1: 75%, 2: 57%)"
    )


def test_on_one_node_nothing_is_said_of_others():
    numbers = traffic_numbers({3: meter([5, 6, 0], [8, 12, 0])}, bytes_per_row=10)
    assert "traffic_saved_percent" not in numbers
    assert numbers["traffic_saved_off_rank_percent"] == 50
    assert "fewer" not in traffic_line(numbers, tokens=3)


def test_a_step_without_expert_layers_has_no_traffic():
    assert traffic_numbers({}, bytes_per_row=10) == {}
