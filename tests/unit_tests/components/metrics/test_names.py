"""Names of the curves in TensorBoard and Weights & Biases."""

import re

from tests.unit_tests.components.metrics.test_metrics import event_files, log_once, only_run
from torchtitan.components.metrics.names import CURVES, FIRST_CHARTS


def test_the_curves_are_named_as_in_torchtitan(tmp_path):
    log_once(tmp_path, enable_tensorboard=True, peak_flops=1e13)
    names = set(event_files(only_run(tmp_path)).Tags()["scalars"])
    assert {
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "grad_norm",
        "throughput(tps)",
        "tflops",
        "mfu(%)",
        "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)",
        "time_metrics/data_loading(%)",
        "memory/max_reserved(GiB)",
        "memory/max_reserved(%)",
    } <= names
    groups = {name.partition("/")[0] for name in names if "/" in name}
    assert groups == {"loss_metrics", "time_metrics", "memory", "balance", "balance_by_layer"}


def test_the_charts_that_come_first_show_curves_that_exist():
    patterns = [each for page in FIRST_CHARTS.values() for chart in page.values() for each in chart]
    assert [p for p in patterns if not any(re.search(p, c) for c in CURVES.values())] == []
