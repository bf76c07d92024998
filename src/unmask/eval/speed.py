"""Decoding speed over answers: tokens per forward and tokens/s, with their spread.

Owns these two quotients for everything that evaluation reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Cost of one answer; `seconds` are those of its own forwards, without waiting."""

    tokens: int
    forwards: int
    seconds: float


def speed_of(costs: Sequence[Cost]) -> dict[str, Any]:
    """Totals, tokens per forward (every forward counted) and tokens/s, and the spread of both over the answers."""
    tokens, forwards, seconds = (sum(column) for column in zip(*costs, strict=True)) if costs else (0, 0, 0.0)
    per_forward = sorted(cost.tokens / max(cost.forwards, 1) for cost in costs)
    per_second = sorted(cost.tokens / cost.seconds for cost in costs if cost.seconds > 0)
    return {
        "tokens": tokens,
        "forwards": forwards,
        "seconds": seconds,
        "tokens_per_forward": tokens / max(forwards, 1),
        "tokens_per_forward_spread": _spread(per_forward),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "tokens_per_second_spread": _spread(per_second),
    }


def _spread(ordered: Sequence[float]) -> dict[str, float] | None:
    if not ordered:
        return None
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
