"""Recipes of quantisation: which matrices have how many bits, and how they are rounded."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from unmask.errors import ConfigError

Method = Literal["nearest", "squares", "gptq"]
"""Of 4 bits: to the nearest number; least squares weighted by mean square inputs; and GPTQ. The latter two need calibration."""


@dataclass(frozen=True)
class QuantizationRecipe:
    """How a model is quantised.

    Attributes:
        bits: of the layers' matrices, 8 or 4; the head and gated LoRA have 8.
        method: of rounding to 4 bits.
        eight_bits: regular expressions of matrices that have 8 bits nevertheless.
    """

    bits: int
    method: Method = "nearest"
    eight_bits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ConfigError(f"bits is {self.bits}; it must be 8 or 4")

    def width(self, name: str) -> int:
        """Bits of a matrix of a layer, by its packed name."""
        return 8 if any(re.search(pattern, name) for pattern in self.eight_bits) else self.bits

    def description(self) -> dict[str, Any]:
        """For a manifest."""
        return {**asdict(self), "eight_bits": list(self.eight_bits), "group": 32 if self.bits == 4 else None}


CALIBRATED = QuantizationRecipe(4, "gptq", (r"(?<!experts)\.(out|down)\.base$",))
"""4 bits for good quality: what adds to the hidden states has 8. Experts have 4 bits throughout."""
