"""Every setting of a run: frozen dataclasses, one per TOML table, one sentence per key.

Names, types and defaults are torchtitan v0.2's, so that its files load; other keys are marked
`(ours)`. `rules/` checks values beyond their types. `--help` prints the sentences below the fields.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torchtitan.config.data_tables import Chat, Dataset, Format, ValidationSet
from torchtitan.config.lora_tables import LoRA
from torchtitan.config.metrics_tables import Metrics, Profiling
from torchtitan.config.optimizer_tables import EMA, LRScheduler, Optimizer
from torchtitan.config.quantize_tables import Quantize
from torchtitan.config.schedule_tables import Schedule


def _listing(*items: Any) -> Any:
    return field(default_factory=lambda: list(items))


@dataclass(frozen=True)
class Job:
    """Description, folder and start of the run."""

    config_file: str | None = None
    """TOML file to read before the command line (or the JSON file that an earlier run saved)."""
    dump_folder: str = "./outputs"
    """Folder for everything that the run writes."""
    description: str = "default job"
    """Purpose of the run, in one line, for the log."""
    print_config: bool = False
    """Print the resolved config at the start."""
    save_config_file: str = "config.json"
    """File name inside dump_folder under which the resolved config is saved."""
    custom_config_module: str = ""
    """Python module that extends the config (must stay empty: model.args replaces it)."""
    check_config: bool = False
    """Check the config for this number of processes and exit (ours)."""


@dataclass(frozen=True)
class Model:
    """Model, size and tokenizer."""

    name: str = "deepseek_v3"
    """Family of the model, a folder of torchtitan/models."""
    flavor: str = "debugmodel"
    """Size within the family, such as 16B; from_hf: that of config.json in hf_assets_path."""
    hf_assets_path: str = "./tests/assets/tokenizer"
    """Folder with the tokenizer (and the Hugging Face config) of the model."""
    tokenizer_path: str | None = None
    """Old name of hf_assets_path (must stay unset)."""
    converters: list[str] = _listing()
    """Changes made to the built model: "lora"; "float8", or FP8 by part as in [quantize.*]."""
    print_after_conversion: bool = False
    """Print the model after the converters ran."""
    args: dict[str, Any] = field(default_factory=dict)
    """Overrides of model arguments, such as --model.args.moe_args.num_experts 8 (ours)."""


@dataclass(frozen=True)
class Training:
    """Data, batch, precision and length of the run."""

    dataset: str = "c4_test"
    """Name of the dataset."""
    dataset_path: str | None = None
    """File, folder or glob to read the dataset from, for local data."""
    dataset_text_key: str = "text"
    """Field of jsonl and parquet records that holds the text (ours)."""
    format: Format = "text"
    """Rows are texts, conversations (chat), or pairs of prompt and completion (ours)."""
    blend: list[Dataset] = _listing()
    """Several datasets by weight, [[training.blend]]; keys of each: docs/config.md (ours)."""
    dataset_num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process (ours)."""
    dataset_lanes: int | None = None
    """Streams of documents, fixed for the life of a run; unset: chosen from the data (ours)."""
    fim_rate: float = 0.0
    """Share of the documents that are rearranged to fill in their middle, in [0, 1] (ours)."""
    fim_tokens: list[str] = _listing("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    """Begin, hole and end token of fill-in-the-middle (ours; DeepSeek's)."""
    local_batch_size: int = 8
    """Sequences per forward pass and data-parallel rank."""
    global_batch_size: int = -1
    """Sequences per optimizer step over all ranks; -1: one forward pass on each of them."""
    seq_len: int = 2048
    """Tokens per sequence."""
    max_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it (inf: never)."""
    steps: int = 10000
    """Optimizer steps of the run."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in CPU memory between uses."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Type in which parameters are kept."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which the forward and backward passes compute."""
    mixed_precision_reduce: Literal["bfloat16", "float32"] = "float32"
    """Type in which FSDP sums gradients over ranks, and a pipeline's over micro-batches."""
    gc_freq: int = 50
    """Steps from one collection of Python garbage to the next."""
    gc_debug: bool = False
    """Collect fully at every step and warn about cycles that hold tensors."""
    non_finite_loss: Literal["stop", "skip_step", "rewind"] = "stop"
    """Action when loss or gradient norm is not finite; rewind: to the last checkpoint (ours)."""
    loss_spike: Literal["warn", "skip_step", "rewind"] = "warn"
    """Action on a loss spike (ours)."""
    loss_spike_factor: float | None = None
    """A loss above this many medians of the last 32 is a spike; unset: no loss is (ours)."""
    trainable_fqns: list[str] = _listing("*")
    """Names of the trained parameters; * stands for anything; with LoRA beside adapters (ours)."""
    frozen_fqns: list[str] = _listing()
    """Names of parameters that are not trained, whatever trainable_fqns says (ours)."""


@dataclass(frozen=True)
class Parallelism:
    """Distribution of the work; the degrees multiply to the number of processes."""

    data_parallel_replicate_degree: int = 1
    """Copies of the sharded model (DDP, or the outer axis of HSDP)."""
    data_parallel_shard_degree: int = -1
    """Processes over which FSDP shards a copy; -1: all that the other degrees leave over."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether gathered weights are freed between forward and backward; "never": experts stay."""
    tensor_parallel_degree: int = 1
    """Processes over which matrices are split."""
    disable_loss_parallel: bool = False
    """With tensor parallelism, compute the loss on gathered instead of split logits."""
    enable_async_tensor_parallel: bool = False
    """Overlap the communication of tensor parallelism with computation."""
    pipeline_parallel_degree: int = 1
    """Processes over which layers are split."""
    module_fqns_per_model_part: list[list[str]] | None = None
    """Names of the modules of each pipeline part, in order; unset: split evenly."""
    pipeline_parallel_first_stage_less_layers: int = 1
    """Layers that the first stage leaves to others because it holds the embedding."""
    pipeline_parallel_last_stage_less_layers: int = 1
    """Layers that the last stage leaves to others because it holds the output."""
    pipeline_parallel_layers_per_stage: int | None = None
    """Layers per stage; unset: derived from the schedule."""
    pipeline_parallel_schedule: str = "1F1B"
    """Order of forward and backward passes of the micro-batches."""
    pipeline_parallel_schedule_csv: str | None = ""
    """File with a custom schedule."""
    pipeline_parallel_microbatch_size: int = 1
    """Sequences per micro-batch."""
    pipeline_parallel_expert_parallel_overlap: bool = False
    """Interleave the pairs of passes in DualPipeV, or a file, around experts' exchanges."""
    context_parallel_degree: int = 1
    """Processes over which each sequence is split."""
    context_parallel_rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """Exchange of keys and values between the parts of a sequence."""
    expert_parallel_degree: int = 1
    """Processes over which experts are distributed."""
    expert_parallel_dispatch: Literal["auto", "all_to_all", "node_limited", "all_gather"] = "auto"
    """Send a token once per rank, once per node, or to all ranks; auto: the fastest (ours)."""
    expert_parallel_capacity: float = 2.0
    """Room for experts' rows with all_gather, over the mean; fuller steps are redone (ours)."""
    expert_parallel_node_size: int | None = None
    """Consecutive processes that share a node; unset: as torchrun started them (ours)."""
    expert_tensor_parallel_degree: int = 1
    """Processes over which each expert's matrices are split."""


# Parts of a checkpoint, which checkpoint.exclude_from_loading may name.
CHECKPOINT_PARTS = ("model", "ema", "optimizer", "lr_scheduler", "dataloader", "train_state", "rng")


@dataclass(frozen=True)
class Checkpoint:
    """Saving and loading; without effect while enable is false."""

    enable: bool = False
    """Save checkpoints, and resume from the latest one."""
    enable_ft_dataloader_checkpoints: bool = True
    """Known from v0.2's files, without effect: [fault_tolerance] is not supported."""
    folder: str = "checkpoint"
    """Folder for checkpoints, inside job.dump_folder."""
    interval: int = 500
    """Steps from one checkpoint to the next."""
    initial_load_path: str | None = None
    """Checkpoint to start from when folder has none."""
    initial_load_model_only: bool = True
    """Load only the weights from initial_load_path."""
    initial_load_in_hf: bool = False
    """Read initial_load_path in the Hugging Face format."""
    initial_load_in_hf_quantized: bool = False
    """Read initial_load_path in the Hugging Face format with FP8 or MXFP4 weights."""
    last_save_model_only: bool = True
    """Save only the weights in the last checkpoint."""
    last_save_in_hf: bool = False
    """Save the last checkpoint in the Hugging Face format."""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float32"
    """Type of the weights in a last checkpoint with weights only."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Whether training continues while a checkpoint is written to disk."""
    keep_latest_k: int = 10
    """Checkpoints to keep; 0 keeps all."""
    load_step: int = -1
    """Step of the checkpoint to load; -1: the latest."""
    exclude_from_loading: list[str] = _listing()
    """Parts not to load: model, ema, optimizer, lr_scheduler, dataloader, train_state, rng."""
    enable_first_step_checkpoint: bool = False
    """Save after the first step too."""
    create_seed_checkpoint: bool = False
    """Save the freshly initialised model on one process and exit."""
    load_only: bool = False
    """Load but never save."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Recomputation of activations in the backward pass, which trades computation for memory."""

    mode: Literal["selective", "full", "memory_budget", "none"] = "selective"
    """Recompute some, all or no activations, or as many as a memory budget requires."""
    selective_ac_option: str = "2"
    """With mode selective: each n-th layer ("2"), or by operation ("op"; "elementwise", ours)."""
    per_op_sac_force_recompute_mm_shapes_by_fqns: list[str] = _listing("moe.router.gate")
    """With "op": modules whose matrix multiplications are recomputed nevertheless."""
    early_stop: bool = False
    """Stop recomputing a layer as soon as all needed tensors are computed."""
    memory_budget: float = 0.5
    """With mode memory_budget: 0 recomputes all, 1 recomputes nothing."""
    visualize_memory_budget_pareto: bool = False
    """With mode memory_budget: draw memory against run time."""
    preserve_rng_state: bool = False
    """Recompute with the random state of the forward pass (needed for dropout only)."""
    determinism_check: str = "default"
    """Compare shapes of recomputed tensors with the first ones ("default") or not ("none")."""
    debug: bool = False
    """Record operations for the error message when recomputation differs (slow)."""


@dataclass(frozen=True)
class Compile:
    """torch.compile."""

    enable: bool = False
    """Compile the parts named in components."""
    components: list[str] = _listing("model", "loss")
    """Parts to compile: model (each block on its own), loss (where logits are held), or both."""
    backend: str = "inductor"
    """Back-end of torch.compile."""
    cuda_graph: bool = False
    """Replay both passes as a CUDA graph; packed documents need nvidia-cudnn-frontend (ours)."""


@dataclass(frozen=True)
class Comm:
    """Process groups."""

    init_timeout_seconds: int = 300
    """Seconds until a collective fails, up to the end of the first step."""
    train_timeout_seconds: int = 100
    """Seconds until a collective fails, after the first step."""
    trace_buf_size: int = 20000
    """Entries that NCCL's flight recorder keeps; 0 switches it off."""
    save_traces_folder: str = "comm_traces"
    """Folder for the flight recorder's files, inside job.dump_folder."""
    save_traces_file_prefix: str = "rank_"
    """Start of the names of these files."""
    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """Real collectives, or a dry run of one of many ranks; local_tensor is refused."""


@dataclass(frozen=True)
class Validation:
    """Loss on other data during the run; without effect while enable is false."""

    enable: bool = False
    """Validate every freq steps."""
    dataset: str = "c4_validation"
    """Name of the dataset."""
    dataset_path: str | None = None
    """File, folder or glob to read the dataset from, for local data."""
    local_batch_size: int = 8
    """Sequences per forward pass and data-parallel rank."""
    seq_len: int = 2048
    """Tokens per sequence."""
    freq: int = 10
    """Training steps from one validation to the next."""
    steps: int = -1
    """Batches per validation and rank; -1: the whole dataset."""
    dataset_text_key: str = "text"
    """Field of jsonl and parquet records that holds the text (ours)."""
    format: Format = "text"
    """Rows are texts, conversations (chat), or pairs of prompt and completion (ours)."""
    sets: list[ValidationSet] = _listing()
    """Several data sets, each with its own loss, [[validation.sets]]: docs/config.md (ours)."""
    sample_prompts: list[str] = _listing()
    """Texts that the model continues at each validation, for TensorBoard and the log (ours)."""
    sample_tokens: int = 64
    """Tokens that it generates for each of them (ours)."""


@dataclass(frozen=True)
class Debug:
    """Reproducibility, and switches for measurements."""

    seed: int | None = None
    """Seed of all random numbers; unset: a new one for each run."""
    deterministic: bool = False
    """Use only deterministic algorithms."""
    deterministic_warn_only: bool = False
    """Warn instead of failing where an operation has no deterministic algorithm."""
    moe_force_load_balance: bool = False
    """Send the same number of tokens to each expert, for benchmarks (the model does not learn)."""


@dataclass(frozen=True)
class JobConfig:
    """All settings of a run: defaults, then the TOML file, then the command line."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    lora: LoRA = field(default_factory=LoRA)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    schedule: Schedule = field(default_factory=Schedule)
    ema: EMA = field(default_factory=EMA)
    training: Training = field(default_factory=Training)
    chat: Chat = field(default_factory=Chat)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    comm: Comm = field(default_factory=Comm)
    validation: Validation = field(default_factory=Validation)
    debug: Debug = field(default_factory=Debug)


def to_dict(config: JobConfig) -> dict[str, Any]:
    """Return the config as plain tables, lists and scalars, ready for `json.dumps`."""
    return asdict(config)
