"""The cases of docs/performance.md's table, as options of a training run.

A case is nothing but options: append your own to change it, or give a TOML file instead.
"""

# Of every benchmark: random tokens take the place of the data, so what ships with the package
# serves instead of a dataset and a tokenizer that may not be here, and nothing is saved.
NO_FILES = [
    "--training.dataset=sample",
    "--model.hf_assets_path=./tests/assets/tokenizer",
    "--checkpoint.no_enable",
]
# Of a speed row, whatever the model.
BASE = [
    "--lr_scheduler.warmup_steps=2",
    "--activation_checkpoint.mode=none",
    "--model.args.moe_args.load_balance_coeff=0.001",
]
FP32 = ["--training.dtype=float32", "--training.mixed_precision_param=bfloat16"]
BF16 = ["--training.dtype=bfloat16", "--training.mixed_precision_param=bfloat16"]
ALL_FP32 = ["--training.dtype=float32", "--training.mixed_precision_param=float32"]
MEAN_DOCUMENT = 200  # tokens, about that of the text that ships with the package
DOCUMENTS = ["--model.args.attn_mask_type=block_causal"]
COMPILE = ["--compile.enable"]
# 1 dense and 7 MoE layers, vocabulary 102,400: 4.6 B parameters.
CUT_16B = ["--model.flavor=16B", "--model.args.n_layers=8"]
# 1 dense and 2 MoE layers at 671B widths with 32 of the 256 experts: 5.7 B parameters.
CUT_671B = [
    "--model.flavor=671B",
    "--model.args.n_layers=3",
    "--model.args.n_dense_layers=1",
    "--model.args.moe_args.num_experts=32",
]


def _size(batch: int, seq_len: int) -> list[str]:
    return [f"--training.local_batch_size={batch}", f"--training.seq_len={seq_len}"]


def _cases() -> dict[str, list[str]]:
    cases = {}
    for batch in (4, 8):
        for name, dtype in (("fp32", FP32), ("bf16", BF16)):
            cut = [*CUT_16B, *_size(batch, 4096), *dtype, *COMPILE]
            cases[f"16b8-b{batch}-{name}"] = cut
            cases[f"16b8-b{batch}-{name}-docs"] = [*cut, *DOCUMENTS]
    for batch in (2, 4):
        cases[f"671b3-b{batch}-bf16"] = [*CUT_671B, *_size(batch, 4096), *BF16, *COMPILE]
    cases["16b-full"] = [
        "--model.flavor=16B",
        *_size(2, 4096),
        *BF16,
        *COMPILE,
        "--optimizer.early_step_in_backward",  # gradients and states of all layers don't fit
        "--training.max_norm=inf",  # clipping would need them all at once
    ]
    cases["debug-bf16"] = ["--model.flavor=debugmodel", *_size(8, 2048), *FP32, *COMPILE]
    for seq_len, batch in ((2048, 1), (512, 4)):
        for name, dtype in (("fp32", ALL_FP32), ("bf16", BF16)):
            debug = ["--model.flavor=debugmodel", *_size(batch, seq_len), *dtype]
            cases[f"cpu-{name}-s{seq_len}"] = debug
    return {name: [*BASE, *options] for name, options in cases.items()}


PRESETS = _cases()
