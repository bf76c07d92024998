"""Ctrl-C during a long job: the first one asks the job to stop, the second one interrupts it; or the first ends it at once.

Owns the signal handlers while a job runs, and what the command says then. Knows nothing of the job, which polls a function.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import typer

from unmask.cli.startup import INTERRUPTED

SAVE_NOTICE = b"\nstopping after this step to save; Ctrl-C again discards what is not saved\n"


@contextlib.contextmanager
def interruptible(going_on: str) -> Iterator[None]:
    """Ctrl-C in the block ends the command, which says on standard error how it is gone on with, such as "the same command"."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {going_on} goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def stop_on_interrupt(
    signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
    notice: bytes = SAVE_NOTICE,
    *,
    on_stop: Callable[[], None] = lambda: None,
    once: bool = False,
) -> Iterator[Callable[[], bool]]:
    """While the block runs, the first of these signals (SIGINT is Ctrl-C) asks to stop, the second one interrupts at once.

    Args:
        signals: which ones.
        notice: written to standard error at the first.
        on_stop: called at the first.
        once: further ones do nothing: torchrun sends its ranks a copy of what they have received already.

    Yields:
        Whether to stop; earlier signal handlers are restored after the block.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Written to the file descriptor, because the signal may have arrived in the middle of a print.
        with contextlib.suppress(OSError):
            os.write(2, notice)
        on_stop()
        signal.signal(number, signal.SIG_IGN if once else signal.default_int_handler)

    earlier_handlers = {number: signal.signal(number, handle) for number in signals}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)
