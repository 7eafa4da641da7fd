"""Which tables of [[optimizer.group]] can be; whether they name parameters, the model says."""

import math

from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError


def check_optimizer_groups(config: JobConfig) -> None:
    """Raise `UserError` for the first table that can't be, or would change nothing."""
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
