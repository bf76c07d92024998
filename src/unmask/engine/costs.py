"""Costs of a forward by what it holds: how dear a draft token is, relative to decoding without any.

Owns a given table, and one that is learnt from the forwards of an engine. Only ratios count, so that it does not matter how
fast the machine is or what else runs on it. Neglected: the length of the contexts, and prompts beside those that decode.

Legend: K forwards, F features of a forward (tokens, noisy tokens, tokens whose candidate takes all logits), P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

_FAR = 2.0**20
_NO_EXTRA: Mapping[int, float] = {0: 0.0}
# Numbers of tokens beyond which one more may have another cost: weights are read once for a few, then products count.
_KINKS = np.array([1, 4, 8, 16])
# Before anything is measured, relative to a forward of one token: each further token, what it costs more past the other kinks,
# any noisy token (gated LoRA is read), each of them, and each token whose candidate takes all logits.
_PRIOR = np.array([0.1, 0.1, 0.03, 0.0, 0.25, 0.05, 0.1])
_PRIOR_ERROR = np.array([0.15, 0.15, 0.1, 0.1, 0.3, 0.1, 0.2])
_NOISE, _DRIFT = 0.1, 1e-3
_SPEED_RATE = 0.1
_OUTLIER = 1.5
_UNKNOWN = 1e9


class ForwardCosts(Protocol):
    """Relative costs of forwards that decode."""

    def relative(self, counts_KF: Counts) -> Floats:
        """Cost of each forward [K], up to a common factor. Increasing in every feature."""
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

    def relative(self, counts_KF: Counts) -> Floats:
        curves = (self.tokens, self.noisy, self.drawn)
        costs_K: Floats = np.sum([_interpolated(curve, counts_KF[:, i]) for i, curve in enumerate(curves)], axis=0)
        return costs_K

    def observe(self, counts_F: Sequence[int], seconds: float) -> None:
        """Changes nothing."""


def _interpolated(curve: Mapping[int, float], counts_K: Counts) -> Floats:
    numbers, costs = np.array(sorted(curve.items()), dtype=np.float64).T
    slope = 0.0 if len(numbers) == 1 else (costs[-1] - costs[-2]) / (numbers[-1] - numbers[-2])
    last = costs[-1] + slope * (_FAR - numbers[-1])
    costs_K: Floats = np.interp(counts_K, [*numbers, _FAR], [*costs, last])
    return costs_K


class MeasuredCosts:
    """Costs learnt from an engine's own forwards: linear in the features, with kinks, by a Kalman filter.

    The seconds of a forward are divided by the present speed of the machine, a running mean in which forwards of few tokens
    count most; outliers are clipped. Forwards of one token say nothing on what more of them cost, and so nothing is forgotten
    by them. Before the first forward, whatever has drafts is taken to be dearer than any gain.
    """

    def __init__(self) -> None:
        self._parameters_P, self._covariance_PP = _PRIOR.copy(), np.diag(_PRIOR_ERROR**2)
        self._drift_PP = _DRIFT * self._covariance_PP
        self._seconds: float | None = None  # of a forward of one token, at present
        self._num_plain = 0

    def relative(self, counts_KF: Counts) -> Floats:
        costs_K: Floats = 1.0 + _inputs(counts_KF) @ self._parameters_P
        if self._seconds is None:
            costs_K[(counts_KF > counts_KF.min(0)).any(1)] = _UNKNOWN
        return costs_K

    def observe(self, counts_F: Sequence[int], seconds: float) -> None:
        x_P = _inputs(np.array([counts_F]))[0]
        predicted = 1.0 + float(x_P @ self._parameters_P)
        if self._seconds is None:
            self._seconds = seconds / predicted
        ratio = min(max(seconds / (self._seconds * predicted), 1 / _OUTLIER), _OUTLIER)
        self._num_plain += counts_F[0] == 1
        self._seconds *= ratio ** (max(_SPEED_RATE, 1 / (self._num_plain + 1)) / predicted**2)
        if counts_F[0] > 1:
            self._learn(x_P, predicted, predicted * (ratio - 1.0))

    def _learn(self, x_P: Floats, predicted: float, error: float) -> None:
        """A step of the filter. Engines in other threads may read and take one meanwhile: arrays are replaced, not changed."""
        covariance_PP = self._covariance_PP + self._drift_PP
        spread_P = covariance_PP @ x_P
        gain_P = spread_P / ((_NOISE * predicted) ** 2 + x_P @ spread_P)
        found_P = self._parameters_P + gain_P * error
        self._covariance_PP = covariance_PP - np.outer(gain_P, spread_P)
        # No forward gets cheaper by a token more.
        slopes = np.maximum(np.cumsum(found_P[: len(_KINKS)]), 0.0)
        self._parameters_P = np.concatenate((np.diff(slopes, prepend=0.0), np.maximum(found_P[len(_KINKS) :], 0.0)))


def _inputs(counts_KF: Counts) -> Floats:
    """Of the linear model, [K, P]."""
    x_KP = np.empty((len(counts_KF), len(_PRIOR)))
    x_KP[:, : len(_KINKS)] = np.maximum(counts_KF[:, :1] - _KINKS, 0)
    x_KP[:, len(_KINKS)] = counts_KF[:, 1] > 0
    x_KP[:, len(_KINKS) + 1 :] = counts_KF[:, 1:]
    return x_KP
