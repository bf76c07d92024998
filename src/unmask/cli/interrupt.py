"""Ending a long job on request: the first Ctrl-C asks politely, the second means it.

Owns the signal handlers while a job runs. Knows nothing of the job: it is handed an object that answers "should I stop?".
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

_NOTICE = b"\nstopping after this step to save; Ctrl-C again gives up what was not saved\n"


class StopRequest:
    """Whether somebody wants the job to end; `should_stop` of a training run."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: remember the wish, and let the next signal interrupt at once."""
        self.requested = True
        # Straight to the descriptor: the signal may have come in the middle of a print.
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE)
        signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """While the block runs, SIGINT (Ctrl-C) and SIGTERM set the request; earlier handlers come back afterwards."""
    request = StopRequest()
    earlier = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
