"""Times of kernels by kind, against sums by hand."""

import pytest

from torchtitan.tools.kernel_times import DeviceTime, device_time

SEND, GEMM = "ncclDevKernel_SendRecv", "nvjet_gemm"


def test_only_communication_that_nothing_hides_is_exposed():
    kernels = [(GEMM, 0, 1000), (SEND, 500, 3000), (SEND, 2000, 3500), (GEMM, 2500, 2600)]
    time = device_time(kernels, step_ms=5.0)
    assert time.computing == pytest.approx(1.1)
    assert time.communication == pytest.approx(3.0)  # 500 to 3500
    assert time.exposed == pytest.approx(2.4)  # 1000 to 3500, less 100 of the last product
    assert time.idle == pytest.approx(1.5)


def test_a_step_without_kernels_is_idle():
    assert device_time([], step_ms=2.0) == DeviceTime(0.0, 0.0, 0.0, 2.0)
