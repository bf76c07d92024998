"""The line that says how far the packing of weights is: once a model, on a terminal, where it takes over a second.

Owns its text. Packing itself is `models.native.packing`'s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_SILENT_SECONDS = 1.0
_CLEAR = "\r\x1b[K"


class PackingLine:
    """Called with (parts done, parts in all); rewrites one line of a terminal, and clears it at the end."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = sys.stderr if stream is None else stream, clock
        self._asked = clock()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (done, now)
        (skipped, began), passed = self._first, now - self._asked
        if not self._stream.isatty() or passed < _SILENT_SECONDS:
            return
        left = (now - began) / max(done - skipped, 1) * (total - done)
        text = "" if done == total else f"packing the weights, once: {done} of {total} parts, {left:.0f} s left"
        self._stream.write(f"{_CLEAR}{text}")
        self._stream.flush()
