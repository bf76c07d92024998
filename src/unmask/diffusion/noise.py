"""Counter-based random numbers: a pure function of (seed, epoch, document, position).

Owns the hash. Has no state, so that resume, other ranks and other batch splits see the same noise. Arithmetic is int64 with
wrap-around, identical on every device.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


def _wrap(value: int) -> int:
    """Any integer modulo 2^64, as int64."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN: Final = _wrap(0x9E3779B97F4A7C15)
"""2^64 / golden ratio: step of the Weyl sequence over documents."""
PLASTIC: Final = _wrap(0xC13FA9A902A6328F)
"""2^64 / plastic number: step of the Weyl sequence over blocks."""

_MIX_1: Final = _wrap(0xBF58476D1CE4E5B9)
_MIX_2: Final = _wrap(0x94D049BB133111EB)
_ALL: Final = 2**64 - 1
_FEW: Final = 8
"""Numbers up to which Python's integers are faster than tensors: a decoding step draws a few."""
_TAGS: Final = {"t": 1, "mask": 2, "count": 3, "embedding": 4, "sample": 5, "replace": 6}


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of int64 whose output bits look independent (Steele et al. 2014)."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def to_unit(x: Tensor) -> Tensor:
    """The top 53 bits of int64 `x` as float64 in [0, 1)."""
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53


def _mix(x: int) -> int:
    """`mix` of one number, in 0..2^64 - 1."""
    x = (x ^ x >> 30) * _MIX_1 & _ALL
    x = (x ^ x >> 27) * _MIX_2 & _ALL
    return x ^ x >> 31


def _uniform(tag: str, seed: int, epoch: int, *counters: int) -> float:
    """`NoiseKey.uniform` of one number."""
    state = _mix(_mix(_mix(seed & _ALL) + epoch & _ALL) + _TAGS[tag] * GOLDEN & _ALL)
    for counter in counters:
        state = _mix(state * GOLDEN + counter & _ALL)
    return (_mix(state) >> 11) * 2.0**-53


@dataclass(frozen=True)
class NoiseKey:
    """Seed and epoch of a batch's noise; `epoch` (and a seed that is a tensor) is int64, broadcastable to whatever is drawn."""

    seed: int | Tensor
    epoch: Tensor

    def scalar(self, tag: str) -> Tensor:
        """One int64 per epoch entry, different for every purpose `tag`."""
        seed = self.seed if isinstance(self.seed, Tensor) else self.epoch.new_full((), _wrap(self.seed))
        seed = mix(seed)  # so that (seed 0, epoch 1) is not (seed 1, epoch 0)
        return mix(mix(seed + self.epoch) + _wrap(_TAGS[tag] * GOLDEN))

    def uniform(self, tag: str, *counters: Tensor | int) -> Tensor:
        """float64 in [0, 1), a hash of (seed, epoch, tag, counters); counters are int64 and broadcast."""
        keys = (self.seed, self.epoch, *counters)
        tensors = [each for each in keys if isinstance(each, Tensor)]
        if all(each.device.type == "cpu" and each.numel() <= _FEW for each in tensors):
            alike = torch.broadcast_tensors(*tensors)
            shape, columns = alike[0].shape, iter(alike)
            if shape.numel() <= _FEW:
                lists = [
                    next(columns).flatten().tolist() if isinstance(each, Tensor) else itertools.repeat(each) for each in keys
                ]
                numbers = [_uniform(tag, *row) for row in zip(*lists, strict=False)]
                return torch.tensor(numbers, dtype=torch.float64).reshape(shape)
        state = self.scalar(tag)
        for counter in counters:
            state = mix(state * GOLDEN + counter)
        return to_unit(mix(state))
