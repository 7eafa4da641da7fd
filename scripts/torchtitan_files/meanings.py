"""Keys and flavors that mean something else here than in torchtitan."""

from typing import Any

from torchtitan.config import JobConfig


def meanings(name: str, flavor: str | None, values: dict[str, Any]) -> list[str]:
    """List the keys of this file that mean something else here, and how to have the old meaning."""
    defaults = JobConfig()
    notes = []
    if values.get("optimizer.weight_decay", defaults.optimizer.weight_decay):
        notes.append(
            "optimizer.weight_decay leaves vectors (norms) alone here; optimizer.weight_decay_on = "
            '"all" decays them too, as torchtitan does'
        )
    if values.get("parallelism.pipeline_parallel_schedule") == "DualPipeV":
        notes.append(
            "parallelism.pipeline_parallel_expert_parallel_overlap is false by default here; true "
            "in torchtitan (the numbers are the same)"
        )
    if name != "deepseek_v3":
        return notes
    notes.append(
        "model.args.norm_eps is 1e-6 here, as DeepSeek's; 1e-5 in torchtitan: set it for weights "
        "that were trained there"
    )
    theirs = {
        "debugmodel": "softmax scores without normalisation and mscale 0.70 (ours: sigmoid)",
        "16B": "an expert bias (load_balance_coeff 0.001) and mscale 0.70 (ours: none and 0.707)",
        "236B": "an expert bias (load_balance_coeff 0.001) and groups scored by their two best "
        "experts (ours: none, and by their best, as the published model)",
    }
    if flavor in theirs:
        notes.append(
            f"model.flavor '{flavor}' of torchtitan has {theirs[flavor]}; [model.args] sets any of "
            "them"
        )
    notes.append(
        "model.args.init_std is 0.006 here (0.02 for debugmodel), as DeepSeek's; "
        "torchtitan's is 0.02 and smaller in deeper layers"
    )
    return notes
