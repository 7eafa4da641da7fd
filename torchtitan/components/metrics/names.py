"""Names of a record's numbers in TensorBoard and Weights & Biases: grouped, torchtitan's if it has
one.

`metrics.jsonl` has the names on the left. docs/read_a_run.md explains each of them.
"""

from collections.abc import Mapping
from typing import Any

# torchtitan's own curves; its users' dashboards know these names.
_TORCHTITAN = {
    "loss": "loss_metrics/global_avg_loss",
    "max_loss": "loss_metrics/global_max_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "tokens_seen": "n_tokens_seen",
    "tps": "throughput(tps)",
    "tflops": "tflops",
    "mfu_percent": "mfu(%)",
    "step_seconds": "time_metrics/end_to_end(s)",
    "data_seconds": "time_metrics/data_loading(s)",
    "data_percent": "time_metrics/data_loading(%)",
    "memory_gib": "memory/max_reserved(GiB)",
    "memory_percent": "memory/max_reserved(%)",
    "memory_active_gib": "memory/max_active(GiB)",
    "validation_loss": "validation_metrics/loss",
}
# Ours, by group.
_GROUPS = {
    "loss_metrics": "skipped_steps rewinds",
    "validation_metrics": (
        "validation_perplexity validation_accuracy validation_tokens validation_seconds "
        "validation_set_loss validation_set_accuracy"
    ),
    "time_metrics": (
        "max_step_seconds waited_ms waited_for_rank waited_for_host_ms waited_for_device_ms "
        "exposed_communication_ms"
    ),
    "balance": (
        "max_violation mean_max_violation min_load dead_experts load_entropy bias_range "
        "max_group_load router_balance_loss router_z_loss router_entropy limited_percent "
        "router_global_balance_loss routing_moved_percent expert_load"
    ),
    "traffic": (
        "rows_sent_self rows_sent_node rows_sent_remote bytes_sent_node bytes_sent_remote "
        "traffic_saved_percent traffic_saved_off_rank_percent cross_node_percent"
    ),
    "data_metrics": (
        "skipped_documents filled_percent trained_percent blend_tokens phase batch_size seq_len"
    ),
}
CURVES = _TORCHTITAN | {
    name: f"{group}/{name.removeprefix('validation_')}"
    for group, names in _GROUPS.items()
    for name in names.split()
}
# Charts of TensorBoard's page "Custom Scalars": what to look at first.
FIRST_CHARTS = {
    "Is it learning?": {
        "loss": ["loss_metrics/global_avg_loss", "validation_metrics/loss"],
        "gradient norm": ["^grad_norm$"],
        "learning rate": ["^lr$"],
    },
    "Is it fast?": {
        "tokens per second and device": [r"throughput\(tps\)"],
        "MFU (%)": [r"mfu\(%\)"],
        "seconds a step": [r"time_metrics/end_to_end\(s\)", r"time_metrics/data_loading\(s\)"],
    },
    "Are the experts used evenly?": {
        "largest load over the mean, minus 1": ["^balance/(mean_)?max_violation"],
        "experts without a token": ["^balance/dead_experts"],
    },
}


def curve(name: str, key: int | str | None = None) -> str:
    """Name the curve of a record's number.

    name: in the record; "layer_<name>" for numbers by layer.
    key: of a number in a table: the layer, or the dataset.
    """
    if isinstance(key, int) or name.startswith("layer_"):
        group, _, short = curve(name.removeprefix("layer_")).rpartition("/")
        return f"{group or 'other'}_by_layer/{short}/layer_{key}"
    if name in CURVES:
        found = CURVES[name]
    elif "_loss" in name:  # beside the main one: mtp_loss_1
        found = f"loss_metrics/{name}"
    else:  # a coefficient that phases set
        found = f"data_metrics/{name}"
    return found if key is None else f"{found}/{key}"


def curves(record: Mapping[str, Any]) -> dict[str, float]:
    """Name the curves of a whole record; TensorBoard has axes of its own for step and time."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if not isinstance(value, Mapping):
            if name not in ("step", "time"):
                found[curve(name)] = value
            continue
        for key, number in value.items():
            if not isinstance(number, list):  # one per expert: shown in the heat map
                found[curve(name, key)] = number
    return found
