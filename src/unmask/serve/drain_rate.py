"""`DrainRate`: how fast a queue empties, and when a refused client should come back.

Owns the estimate. Knows neither requests nor HTTP; the caller gives the time.
"""

from __future__ import annotations

import math

MAX_RETRY_SECONDS = 60
"""Official clients wait at most so long, and less if they are told more."""
_WEIGHT = 0.05  # of the newest of the measured intervals


class DrainRate:
    """The rate at which completions end, measured while there are any, and the retries that were promised room.

    Refused clients share what drains: each is told to come back when room for those before it has been made as well, so that
    they do not all come back at once.
    """

    def __init__(self) -> None:
        self._interval = 1.0  # seconds between ends, averaged
        self._since = 0.0  # the last end, or when the queue was last empty
        self._promised = 0.0  # refused requests that have not been given the time to come back
        self._promised_at = 0.0

    def begin(self, now: float) -> None:
        """A request has arrived at an empty queue."""
        self._since = now

    def end(self, now: float) -> None:
        """A completion has ended."""
        self._interval += _WEIGHT * (now - self._since - self._interval)
        self._since = now

    def retry_seconds(self, count: int, now: float) -> int:
        """Whole seconds until there may be room for so many refused requests."""
        drained = (now - self._promised_at) / self._interval
        self._promised = max(0.0, self._promised - drained) + count
        self._promised_at = now
        return min(max(1, math.ceil(self._promised * self._interval)), MAX_RETRY_SECONDS)
