"""Which rank the others wait for, from times made by hand."""

import pytest
import torch

from torchtitan.components.metrics.waiting import WaitProfile, find_straggler, line
from torchtitan.tools.kernel_times import DeviceTime


def ranks(*late: DeviceTime) -> list[DeviceTime]:
    """Three ranks of 300 ms computing that wait 60 ms, and the late one behind them."""
    return [DeviceTime(300.0, 100.0 + r, 60.0, 10.0) for r in range(3)] + list(late)


@pytest.mark.parametrize(
    ("late", "host", "device", "why"),
    [
        (DeviceTime(300.0, 45.0, 8.0, 65.0), 55.0, 0.0, "its host"),
        (DeviceTime(352.0, 45.0, 8.0, 12.0), 2.0, 52.0, "its device"),
    ],
)
def test_the_rank_that_waits_least_is_late_and_why(late, host, device, why):
    found = find_straggler(ranks(late))
    assert found.rank == 3 and found.waited == pytest.approx(101.0 - 45.0)
    assert (found.host, found.device) == (host, device)
    assert f"waited 56.0 of 370.0 ms for rank 3, {why} (" in line(7, found, 370.0)


def test_equal_ranks_wait_for_nobody():
    found = find_straggler([DeviceTime(300.0, 40.0, 8.0, 10.0)] * 4)
    assert (found.waited, found.host, found.device) == (0.0, 0.0, 0.0)


def test_one_process_or_a_cpu_is_not_profiled():
    waiting = WaitProfile(1, torch.device("cpu"))
    with waiting.around(1):
        pass
    assert waiting.freq == 0 and waiting.take_numbers() == {}
