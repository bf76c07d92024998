"""`PreparedAdapters`: adapters as a backend computes them, for as long as somebody uses them.

Owns their lifetime. What an adapter becomes is the backend's matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from unmask.models.weights.lora_adapter import LoraAdapter

T = TypeVar("T")


class PreparedAdapters(Generic[T]):
    """What `prepare` has made of each adapter; forgotten with the adapter."""

    def __init__(self, prepare: Callable[[LoraAdapter], T]) -> None:
        self._prepare = prepare
        self._prepared: WeakKeyDictionary[LoraAdapter, T] = WeakKeyDictionary()

    def of(self, adapter: LoraAdapter) -> T:
        """The adapter, prepared: now, if it has not been yet."""
        prepared = self._prepared.get(adapter)
        if prepared is None:
            prepared = self._prepared[adapter] = self._prepare(adapter)
        return prepared
