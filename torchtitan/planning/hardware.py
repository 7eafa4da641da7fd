"""Accelerators and the rates that they reach, from hardware.toml, which is there to be edited."""

from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli

from torchtitan.tools.errors import UserError, suggest

# Share of a network's speed that collectives reach: DeepEP's README, 43 of 50 GB/s, a little less.
REACHED = 0.84
TABLE = Path(__file__).with_name("hardware.toml")
_MAY_BE_0 = ("overhead_gib", "slack", "hidden", "host", "second_hop_ms")


@dataclass(frozen=True)
class Hardware:
    """One row of hardware.toml, whose head explains the fields."""

    name: str
    about: str
    memory_gib: float
    overhead_gib: float
    slack: float
    bf16_tflops: float
    memory_tb_s: float
    gemm: float
    grouped: float
    attention_forward: float
    attention_backward: float
    elementwise: float
    nvlink_gb_s: float
    network_gb_s: float
    gpus_per_node: int
    hidden: float
    host: float
    second_hop_ms: float
    fp8_gemm: float = 0.0
    fp8_grouped: float = 0.0

    @property
    def peak_flops(self) -> float:
        return self.bf16_tflops * 1e12

    @property
    def bytes_per_second(self) -> float:
        """Bandwidth of the device's memory, as kernels reach it."""
        return self.memory_tb_s * 1e12 * self.elementwise

    @property
    def network_gbits(self) -> float:
        """Speed of a GPU's network, in Gbit/s, of which collectives reach a share."""
        return self.network_gb_s * 8 / REACHED

    def on_network(self, gbits: float) -> "Hardware":
        """Return the same hardware on another network.

        gbits: its speed for each GPU, in Gbit/s.
        """
        about = f"{self.about}, network of {gbits:g} Gbit/s a GPU"
        return replace(self, about=about, network_gb_s=gbits / 8 * REACHED)

    def needed_gib(self, allocated: float) -> float:
        """Return the device's memory that a run needs.

        allocated: bytes of tensors at the peak.
        """
        return allocated / 2**30 * (1 + self.slack) + self.overhead_gib

    def fits(self, allocated: float) -> bool:
        return self.needed_gib(allocated) <= self.memory_gib


def find_hardware(name: str) -> Hardware:
    """Return a row of the table. Raises `UserError` for an unknown name, or a damaged table."""
    try:
        rows = tomli.loads(TABLE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{TABLE} can't be read ({error}); mend it, or restore it.") from None
    wanted = name.lower().replace("-", "_")
    if wanted not in rows:
        raise UserError(
            f"--hardware '{name}' is not in {TABLE.name}, which has {', '.join(rows)}: name one of "
            "them, or add a row for it."
        )
    return _checked(wanted, rows[wanted])


def _checked(name: str, row: dict[str, Any]) -> Hardware:
    expected = {f.name: f.type for f in fields(Hardware)} | {"name": "str"}
    optional = {f.name for f in fields(Hardware) if f.default is not MISSING}
    for key in expected.keys() - row.keys() - optional - {"name"}:
        raise UserError(f"{TABLE}: [{name}] lacks {key}; the head of the file says what it is.")
    for key, value in row.items():
        if key not in expected or key == "name":
            raise UserError(f"{TABLE}: [{name}] {key} is not a key{suggest(key, expected)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key != "about" and not (is_number and 0 <= value < float("inf")):
            raise UserError(f"{TABLE}: [{name}] {key} = {value!r} must be a number from 0.")
    for key in expected.keys() - optional - {"name", "about", *_MAY_BE_0}:
        if not row[key]:
            raise UserError(f"{TABLE}: [{name}] {key} = 0 must be above 0.")
    return Hardware(name=name, **row)
