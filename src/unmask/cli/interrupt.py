"""Ctrl-C during a long job: the first one asks the job to stop, the second one interrupts it.

Owns the signal handlers while a job runs. Knows nothing of the job, which polls a `StopRequest`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from types import FrameType

SAVE_NOTICE = b"\nstopping after this step to save; Ctrl-C again discards what is not saved\n"


class StopRequest:
    """Whether the user has asked the job to stop; call it to find out.

    Args:
        notice: printed to standard error at the first signal.
    """

    def __init__(self, notice: bytes) -> None:
        self.requested, self._notice = False, notice

    def __call__(self) -> bool:
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: record the request, and let the next signal interrupt at once."""
        self.requested = True
        # Written to the file descriptor, because the signal may have arrived in the middle of a print.
        with contextlib.suppress(OSError):
            os.write(2, self._notice)
        signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def stop_on_interrupt(
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM), notice: bytes = SAVE_NOTICE
) -> Iterator[StopRequest]:
    """While the block runs, the first signal (SIGINT is Ctrl-C) sets the request; earlier handlers are restored afterwards."""
    request = StopRequest(notice)
    earlier_handlers = {number: signal.signal(number, request.handle) for number in signals}
    try:
        yield request
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)
