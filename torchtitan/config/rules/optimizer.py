"""Rules for [optimizer] and [[optimizer.group]].

Patterns that match no parameter are found later, with the model (components/optimizer).
"""

import math

from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError


def check_optimizer_groups(config: JobConfig) -> None:
    """Raise `UserError` for the first table that is impossible, or would change nothing."""
    for n, table in enumerate(config.optimizer.group, start=1):
        where = f"optimizer.group {n}"
        if not table.match or "" in table.match:
            raise UserError(
                f"{where}: match = {as_text(table.match)} must name parameters, for example "
                '["tok_embeddings.*", "*norm.weight"].'
            )
        if table.weight_decay is not None and not 0 <= table.weight_decay < math.inf:
            raise UserError(
                f"{where}: weight_decay = {as_text(table.weight_decay)} must be a finite number, "
                "0 or more."
            )
        if not 0 < table.lr_factor < math.inf:
            raise UserError(
                f"{where}: lr_factor = {as_text(table.lr_factor)} must be a finite number above 0."
            )
        if table.weight_decay is None and table.lr_factor == 1:
            raise UserError(
                f"{where} changes nothing; set weight_decay, lr_factor or both, or leave the table "
                "out."
            )


# A step moves a running mean by 1 - beta of the way to the new value; bf16 resolves 0.4 %.
LARGEST_BF16_BETA = 0.99


def check_state_dtype(config: JobConfig) -> None:
    """Raise `UserError` where the optimizer's states can't be kept in `state_dtype`."""
    optimizer = config.optimizer
    if optimizer.state_dtype == "float32":
        return
    if optimizer.name != "AdamW":
        raise UserError(
            f'optimizer.state_dtype = "bfloat16" is for AdamW, but optimizer.name is '
            f'{as_text(optimizer.name)}; set state_dtype to "float32".'
        )
    for key in ("beta1", "beta2"):
        beta = getattr(optimizer, key)
        if beta > LARGEST_BF16_BETA:
            raise UserError(
                f'optimizer.{key} = {beta} with optimizer.state_dtype = "bfloat16": a step would '
                "change the running mean by less than bf16 resolves; set it to "
                f'{LARGEST_BF16_BETA} or less, or state_dtype to "float32".'
            )
