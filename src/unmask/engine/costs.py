"""Costs of a forward by what it holds: how dear a draft token is, relative to decoding without any.

Owns a given table, and one that is learnt from the forwards of an engine. Only ratios count, so that it does not matter how
fast the machine is or what else runs on it. Neglected: the length of the contexts, and prompts beside those that decode.

Legend: K forwards, F features of a forward (tokens, noisy tokens, tokens whose candidate takes all logits), P parameters.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from math import sqrt
from operator import add, mul, sub
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

_NO_EXTRA: Mapping[int, float] = {0: 0.0}
# Numbers of tokens beyond which one more may have another cost: weights are read once for a few, then products count.
_KINKS = (1, 4, 8, 16)
_VNNI = (0.09, -0.06, -0.01, 0.03, 0.15, 0.02, 0.1)
_PRIORS: dict[str | None, tuple[float, ...]] = {
    "avx2": (0.08, 0.1, 0.0, 0.02, 0.22, 0.08, 0.1),
    **dict.fromkeys(("avxvnni", "avx512vnni"), _VNNI),
    "amx": (0.04, 0.0, 0.0, 0.0, 0.17, 0.03, 0.1),
    None: (0.1, 0.1, 0.03, 0.0, 0.25, 0.05, 0.1),
}
"""By the kind of kernels (None: any other), before anything is measured, relative to a forward of one token: each further
token, what it costs more past the other kinks, any noisy token (gated LoRA is read), each of them, and each token whose
candidate takes all logits."""
_PRIOR_ERRORS = (0.15, 0.15, 0.1, 0.1, 0.3, 0.1, 0.2)
_NOISE, _DRIFT = 0.1, 1e-3
_NUM_RECENT, _QUANTILE = 16, 0.3
_NUM_FIRST, _EVERY = 64, 5
"""Of an engine's forwards of more than one token, all are learnt from up to this number, then every so many: it takes time."""
_OUTLIER = 1.5
_SLOWER = 0.2
"""What a forward that took longer than expected counts: another process may have been why."""
_ABSURD = 1e6
_LEAST_SURE = 0.3
"""Of the prior's errors, what costs learnt in another process are uncertain by at least: the machine may have changed."""


class ForwardCosts(Protocol):
    """Relative costs of forwards that decode. Increasing in every feature.

    Attributes:
        margin: times its price, what a draft must be worth, since prices and probabilities are estimates.
    """

    @property
    def margin(self) -> float: ...

    def cost(self, tokens: int, noisy: int, drawn: int) -> float:
        """Of one forward, up to a common factor."""
        ...

    def relative(self, counts_KF: Counts) -> Floats:
        """The same of several [K]."""
        ...

    def observe(self, counts_F: Sequence[int], seconds: float) -> None:
        """A forward took this long, sampling included."""
        ...


@dataclass(frozen=True)
class CostTable:
    """Given costs, the same for ever: the same requests are then decoded by the same forwards.

    Between the given numbers of tokens costs are interpolated, beyond the last by the last slope; one number alone is a cost
    that does not grow.

    Attributes:
        tokens: cost by number of tokens.
        noisy: added cost by number of noisy tokens.
        drawn: added cost by number of tokens whose candidate takes all logits.
    """

    tokens: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    noisy: Mapping[int, float] = field(default_factory=lambda: _NO_EXTRA)
    drawn: Mapping[int, float] = field(default_factory=lambda: _NO_EXTRA)

    @property
    def margin(self) -> float:
        return 1.0

    def cost(self, tokens: int, noisy: int, drawn: int) -> float:
        curves = self._curves
        return _interpolated(curves[0], tokens) + _interpolated(curves[1], noisy) + _interpolated(curves[2], drawn)

    def relative(self, counts_KF: Counts) -> Floats:
        return np.array([self.cost(*counts) for counts in counts_KF.tolist()])

    def observe(self, counts_F: Sequence[int], seconds: float) -> None:
        """Changes nothing."""

    @cached_property
    def _curves(self) -> tuple[list[tuple[int, float]], ...]:
        return tuple(sorted(curve.items()) for curve in (self.tokens, self.noisy, self.drawn))


def _interpolated(curve: Sequence[tuple[int, float]], number: int) -> float:
    right = min(bisect_right(curve, (number, np.inf)), len(curve) - 1)
    if right == 0 or number <= curve[0][0]:
        return curve[0][1]
    (before, low), (after, high) = curve[right - 1 : right + 1]
    return low + (high - low) / (after - before) * (number - before)


class MeasuredCosts:
    """Costs learnt from an engine's own forwards: linear in the features, with kinks, by a Kalman filter.

    The seconds of a forward are divided by those that one of one token takes at present, a low quantile of the last forwards in
    which those of few tokens count most. A forward that took longer than expected counts less than one that took less time, and
    outliers are clipped: what is learnt are the costs of forwards that no other process disturbed.

    Args:
        kernels: the kind of kernels, whose usual costs hold before anything is measured; None: unknown.
    """

    margin = 1.15
    # Where products are all that counts, a token costs what it is worth: without a margin, errors would decide there.

    def __init__(self, kernels: str | None = None) -> None:
        self._parameters_P: tuple[float, ...] = _PRIORS.get(kernels, _PRIORS[None])
        self._covariance_PP = _diagonal(_PRIOR_ERRORS)
        self._recent: deque[tuple[float, float]] = deque(maxlen=_NUM_RECENT)  # seconds of a forward of one token, and weights
        self._num_observed = 0

    def cost(self, tokens: int, noisy: int, drawn: int) -> float:
        parameters = self._parameters_P
        total = 1.0
        for kink, slope in zip(_KINKS, parameters, strict=False):
            if tokens <= kink:
                break
            total += slope * (tokens - kink)
        if noisy:
            total += parameters[-3] + parameters[-2] * noisy
        return total + parameters[-1] * drawn

    def relative(self, counts_KF: Counts) -> Floats:
        x_KP = np.empty((len(counts_KF), len(_PRIOR_ERRORS)))
        x_KP[:, : len(_KINKS)] = np.maximum(counts_KF[:, :1] - np.array(_KINKS), 0)
        x_KP[:, len(_KINKS)] = counts_KF[:, 1] > 0
        x_KP[:, len(_KINKS) + 1 :] = counts_KF[:, 1:]
        costs_K: Floats = 1.0 + x_KP @ np.array(self._parameters_P)
        return costs_K

    def observe(self, counts_F: Sequence[int], seconds: float) -> None:
        tokens, noisy, drawn = counts_F
        predicted = self.cost(tokens, noisy, drawn)
        self._num_observed += tokens > 1
        if tokens > 1 and self._recent and (self._num_observed <= _NUM_FIRST or self._num_observed % _EVERY == 0):
            ratio = min(max(seconds / (self._seconds() * predicted), 1 / _OUTLIER), _OUTLIER)
            self._learn(_inputs(*counts_F), predicted, predicted * (ratio - 1.0), _SLOWER if ratio > 1 else 1.0)
        self._recent.append((seconds / predicted, predicted**-2))

    def state(self) -> dict[str, list[float]]:
        """What has been learnt, for JSON."""
        return {
            "parameters": list(self._parameters_P),
            "errors": [sqrt(row_P[i]) for i, row_P in enumerate(self._covariance_PP)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Start from what has been learnt before, by another engine or process.

        Raises:
            KeyError, TypeError, ValueError: this is no such state; nothing has changed.
        """
        parameters_P, errors_P = (tuple(float(value) for value in state[name]) for name in ("parameters", "errors"))
        for values_P in (parameters_P, errors_P):
            if len(values_P) != len(_PRIOR_ERRORS) or not all(abs(value) < _ABSURD for value in values_P):
                raise ValueError(f"costs are {values_P}; they must be {len(_PRIOR_ERRORS)} numbers")
        self._parameters_P = _increasing(parameters_P)
        self._covariance_PP = _diagonal([max(e, _LEAST_SURE * p) for e, p in zip(errors_P, _PRIOR_ERRORS, strict=True)])

    def _seconds(self) -> float:
        """Of a forward of one token, at present."""
        recent = sorted(self._recent)
        reached = list(accumulate(weight for _, weight in recent))
        return recent[bisect_left(reached, _QUANTILE * reached[-1])][0]

    def _learn(self, x_P: Sequence[float], predicted: float, error: float, weight: float) -> None:
        """A step of the filter, in lists: NumPy is slower for so few numbers. Engines in other threads may read and take one
        meanwhile: lists are replaced, not changed."""
        places = range(len(x_P))
        covariance_PP = [
            [value + (_DRIFT * _PRIOR_ERRORS[i] ** 2 if i == j else 0.0) for j, value in enumerate(row_P)]
            for i, row_P in enumerate(self._covariance_PP)
        ]
        spread_P = [sum(map(mul, row_P, x_P)) for row_P in covariance_PP]
        certainty = 1 / ((_NOISE * predicted) ** 2 / weight + sum(map(mul, x_P, spread_P)))
        self._covariance_PP = [[covariance_PP[i][j] - certainty * spread_P[i] * spread_P[j] for j in places] for i in places]
        found_P = map(add, self._parameters_P, [certainty * error * spread for spread in spread_P])
        self._parameters_P = _increasing(list(found_P))


def _increasing(parameters_P: Sequence[float]) -> tuple[float, ...]:
    """The parameters, so that no forward gets cheaper by a token more."""
    count = len(_KINKS)
    slopes = [max(slope, 0.0) for slope in accumulate(parameters_P[:count])]
    return (slopes[0], *map(sub, slopes[1:], slopes), *(max(value, 0.0) for value in parameters_P[count:]))


def _inputs(tokens: int, noisy: int, drawn: int) -> list[float]:
    """Of the linear model, [P]."""
    return [*(max(tokens - kink, 0) for kink in _KINKS), noisy > 0, noisy, drawn]


def _diagonal(errors_P: Sequence[float]) -> list[list[float]]:
    return [[error**2 if i == j else 0.0 for j in range(len(errors_P))] for i, error in enumerate(errors_P)]
