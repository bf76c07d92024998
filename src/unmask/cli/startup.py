"""Ctrl-C while the program starts: it ends at once and quietly.

An exception in the middle of an import would be a traceback, and not always this one. Knows nothing of what is started.
"""

from __future__ import annotations

# What `signal` wraps: it is there at once, while `signal` takes longer to import than all before it.
import _signal as signal  # type: ignore[import-not-found]
import os

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""


def exit_on_interrupt() -> None:
    """End the process at Ctrl-C, until `raise_on_interrupt`."""
    # Where it is ignored, as in the background or under nohup, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)
