"""A mixture of experts with real predictions: a dense model upcycled in memory, as `scripts/upcycle.py` does on disk."""

from __future__ import annotations

from typing import Any

import upcycle
from upcycle import Upcycling

from unmask.models.arch.transformer import Transformer


def upcycled(dense: Transformer, *, family: str = "bailing_moe_v2", **options: Any) -> Transformer:
    """The mixture that says what `dense` says; options as of `Upcycling`."""
    return upcycle.upcycled(dense, Upcycling(family=family, **options))
