"""Rules for model.converters and [quantize.*].

What is converted, and whether the GPU can, is found later (components/quantize).
"""

from torchtitan.config.job_config import JobConfig
from torchtitan.config.quantize_tables import EXPERTS, FLOAT8
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError, suggest

_MX = ("mx", "quantize.linear.mx", "quantize.grouped_mm.mx")
_PREFIX = "quantize.linear.float8."


def check_converters(config: JobConfig, device_type: str) -> None:
    """Raise `UserError` for converters that don't exist, or settings that they can't follow."""
    converters = config.model.converters
    known = ("lora", *FLOAT8)
    for name in converters:
        if name in _MX:
            raise UserError(
                f'model.converters names "{name}", MXFP8, which is for Blackwell GPUs and is not '
                'supported yet; on Hopper GPUs name "float8", or leave it out.'
            )
        if name not in known:
            raise UserError(
                f'model.converters names "{name}", which does not exist{suggest(name, list(known))}'
            )
    if any(name in FLOAT8 for name in converters):
        _check_float8(config, device_type)


def _check_float8(config: JobConfig, device_type: str) -> None:
    converters, float8 = config.model.converters, config.quantize.linear.float8
    if float8.recipe_name not in (None, "blockwise") and float8.enable_fsdp_float8_all_gather:
        raise UserError(
            f"{_PREFIX}enable_fsdp_float8_all_gather = true sends blocks with their scales, but "
            f"{_PREFIX}recipe_name = {as_text(float8.recipe_name)} has none; set the one to false, "
            'or the other to "blockwise".'
        )
    if float8.enable_fsdp_float8_all_gather and config.training.enable_cpu_offload:
        raise UserError(
            f"{_PREFIX}enable_fsdp_float8_all_gather = true quantises weights where they are kept, "
            "but training.enable_cpu_offload = true keeps them on the host; set either to false."
        )
    if float8.precompute_float8_dynamic_scale_for_fsdp:
        raise UserError(
            f"{_PREFIX}precompute_float8_dynamic_scale_for_fsdp = true is for gathers with "
            "tensor-wise scales, which need a maximum over all ranks; blocks, which are gathered "
            "here, need none: set it to false."
        )
    if "auto_filter_small_kn" in float8.filter_fqns:
        raise UserError(
            f'{_PREFIX}filter_fqns names "auto_filter_small_kn", torchao\'s tables of sizes, '
            "which are not here; name the modules that shall stay in bfloat16."
        )
    if EXPERTS in converters and not config.quantize.grouped_mm.float8.fqns:
        raise UserError(
            f'model.converters names "{EXPERTS}", but {EXPERTS}.fqns is empty, so that nothing is '
            'converted; set it to ["experts"].'
        )
    if config.quantize.grouped_mm.float8.dispatch and not {"float8", EXPERTS} & set(converters):
        raise UserError(
            f"{EXPERTS}.dispatch = true sends tokens as experts in FP8 take them, but "
            f"model.converters = {as_text(converters)} converts no experts; add "
            f'"{EXPERTS}", or set it to false.'
        )
    if not float8.emulate:
        _check_machine(config, device_type)


def _check_machine(config: JobConfig, device_type: str) -> None:
    if device_type != "cuda":
        raise UserError(
            f"model.converters = {as_text(config.model.converters)} needs a Hopper GPU, but this "
            f"run is on {device_type}; set {_PREFIX}emulate to true to compute the same numbers "
            "slowly, or model.converters to []."
        )
    computes = config.training.mixed_precision_param
    if computes != "bfloat16":
        raise UserError(
            f'training.mixed_precision_param = "{computes}" with model.converters = '
            f"{as_text(config.model.converters)}: FP8's kernels take and return bfloat16; set it "
            'to "bfloat16".'
        )
