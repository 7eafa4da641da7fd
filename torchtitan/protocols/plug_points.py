"""Plug points: the changes that other files may make to a finished module, and their order.

A model is built plain, on one device. Everything that makes it parallel, cheaper or faster acts
through the points below, from top to bottom; no code wraps or replaces a private method of another
class. tests/test_plug_points.py finds every such change in the code and compares it with this list.
"""

from typing import NamedTuple


class PlugPoint(NamedTuple):
    """One kind of change.

    target: attribute that is assigned, or method that is called.
    on: modules that are changed.
    files: files that may change them, relative to torchtitan/.
    meaning: effect of the change.
    """

    target: str
    on: str
    files: tuple[str, ...]
    meaning: str


# In the order of a run: adapters, FP8, cut, tensor, expert, context, recomputation, compile, data,
# compute weights, then what may change while it runs.
PLUG_POINTS = (
    PlugPoint(
        "adapt",
        "a linear layer; experts",
        ("components/finetuning/lora.py",),
        "low-rank adapters beside the weights, in the whole model",
    ),
    PlugPoint(
        "fp8",
        "a linear layer; experts",
        (
            "components/quantize/float8.py",
            "distributed/tensor_parallel.py",
            "distributed/float8_gather.py",
        ),
        "products with the weights in FP8, in the whole model; not of parts that FP8 can't take; "
        "gathers in FP8 where shards allow",
    ),
    PlugPoint(
        "_modules",
        "the whole model",
        ("distributed/pipeline_parallel.py",),
        "a pipeline stage keeps its own layers; before anything else",
    ),
    PlugPoint(
        "register_parameter",
        "a module with weights",
        (
            "distributed/tensor_parallel.py",
            "distributed/expert_parallel.py",
            "distributed/gathered_weight.py",
            "planning/state.py",
            "planning/trace.py",
        ),
        "the weight becomes a DTensor of which this rank holds a part",
    ),
    PlugPoint(
        "__class__",
        "a module with weights",
        ("distributed/tensor_parallel.py",),
        "reading a weight gives this rank's plain part of it",
    ),
    PlugPoint(
        "register_forward_pre_hook",
        "a module between whose calls the sequence is split; a stage; the model",
        (
            "distributed/tensor_parallel.py",
            "distributed/pipeline_parallel.py",
            "distributed/gathered_weight.py",
            "components/optimizer/compute_weights.py",
        ),
        "inputs are gathered or cut; masks are made; copies are brought up to date and gathered",
    ),
    PlugPoint(
        "register_forward_hook",
        "a module between whose calls the sequence is split",
        (
            "distributed/tensor_parallel.py",
            "distributed/gathered_weight.py",
            "proof/record.py",
        ),
        "outputs are gathered or reduce-scattered; gathered weights are freed",
    ),
    PlugPoint(
        "n_heads",
        "attention",
        ("models/deepseek_v3/parallelize.py",),
        "the heads of this rank, with tensor parallelism",
    ),
    PlugPoint(
        "loss_fn",
        "MTPLayers",
        ("models/deepseek_v3/parallelize.py",),
        "the loss of logits that are split over ranks",
    ),
    PlugPoint(
        "dispatcher",
        "MoE",
        ("distributed/expert_parallel.py",),
        "how tokens reach their experts",
    ),
    PlugPoint(
        "sequence_group",
        "MoE",
        ("models/decoder/parallelize.py",),
        "the ranks that hold the other parts of each sequence, for the balance loss",
    ),
    PlugPoint(
        "attend_with",
        "SelfAttention",
        ("distributed/context_parallel.py", "models/decoder/cache.py"),
        "attention on keys and values of other ranks, or of a cache; never both",
    ),
    PlugPoint(
        "choose_outside_graphs",
        "TokenChoiceTopKRouter",
        ("models/decoder/parallelize.py",),
        "recomputation sees the choice of experts where a layer is compiled in pieces",
    ),
    PlugPoint(
        "forward",
        "a transformer block; the embedding",
        (
            "distributed/tensor_parallel.py",
            "distributed/activation_checkpoint.py",
            "distributed/compile.py",
        ),
        "rows of the table are split; layers are recomputed, then compiled, or the other way round "
        "where a layer can't be one graph",
    ),
    PlugPoint(
        "fully_shard",
        "embedding, blocks, experts, head, the model",
        ("distributed/fsdp.py",),
        "FSDP2 units",
    ),
    PlugPoint(
        "tensor",
        "Joint",
        ("components/optimizer/compute_weights.py",),
        "several weights as one tensor of the compute dtype",
    ),
    PlugPoint(
        "__dict__",
        "a module with weights",
        ("components/optimizer/compute_weights.py",),
        "reading a weight gives its copy in the compute dtype",
    ),
    PlugPoint(
        "collect_router_stats",
        "MoE",
        ("trainer/built_run.py",),
        "collect the router's statistics",
    ),
    PlugPoint(
        "softmax_scale",
        "attention",
        ("models/deepseek_v3/model.py",),
        "a phase of the run changes YaRN",
    ),
    PlugPoint(
        "loss_weight",
        "MTPLayers",
        ("models/deepseek_v3/model.py",),
        "a phase of the run sets it",
    ),
)
