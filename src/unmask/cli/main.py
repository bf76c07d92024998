"""The entry point of the `unmask` program: what must hold before anything slow is imported.

Owns closed standard streams, how OpenMP's threads wait, and Ctrl-C until a verb begins. The allocator is `allocator`'s, the
application `app`'s.
"""

from __future__ import annotations

import os
import sys

from unmask.cli.allocator import start_anew_with_allocator
from unmask.cli.startup import exit_on_interrupt

SPINNING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}
"""Rounds of a loop for GNU's OpenMP, milliseconds for LLVM's."""


def main() -> None:
    """Run the program."""
    exit_on_interrupt()
    _open_streams()
    limit_spinning()
    start_anew_with_allocator(sys.argv)
    from unmask.cli.app import run

    run()


def limit_spinning() -> None:
    """Let PyTorch's threads sleep when they have waited for microseconds, unless the environment says how they wait.

    A thread that spins keeps a core from other programs, and from the very thread that it waits for: beside one busy process a
    training step then takes several times as long (benchmarks/contention.py). OpenMP reads this when PyTorch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SPINNING.items():
            os.environ.setdefault(name, value)


def _open_streams() -> None:
    """Refuse a closed standard output; of a closed input or error stream read nothing, and drop what is written."""
    # The lowest free descriptor is the closed one: the next file that is opened would become the stream.
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  (for as long as the program runs)
    if sys.stdout is None:
        if sys.stderr is not None:
            sys.stderr.write("error: standard output is closed; redirect it, to /dev/null if nobody reads it\n")
        raise SystemExit(1)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
