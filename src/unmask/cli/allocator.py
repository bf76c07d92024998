"""The memory allocator of training on a CPU: tcmalloc or jemalloc, where one is installed, in place of the C library's.

A training step allocates and frees some thousand tensors of sizes that differ from step to step. glibc's heap fragments: after
a hundred steps it searches its free lists for a fifth of the time and faults in pages that it has given back; a step then takes
twice as long as at first (docs/log.md). Owns which library is taken, and the start anew that takes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

PRELOAD = "LD_PRELOAD"
TRAINING = ("convert", "sft", "dpo")
FOLDERS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
LIBRARIES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libjemalloc.so.2")
"""The best first."""
LONG = 100_000
"""Tokens of a run."""


def start_anew_with_allocator(argv: Sequence[str]) -> None:
    """Replace this process by the same command with another allocator, if it trains and one is installed."""
    if sys.platform == "linux" and argv[1:2] and argv[1] in TRAINING:
        environment = with_allocator(os.environ, installed(FOLDERS))
        if environment is not None:
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def hint(num_tokens: int) -> str | None:
    """What to tell before a run of so many tokens on a CPU, if it is long enough to gain from an allocator that is missing."""
    if sys.platform != "linux" or num_tokens < LONG or _loads_one(os.environ):
        return None
    return (
        "steps of a long run on a CPU take half as long with tcmalloc; on Debian and Ubuntu: apt install libtcmalloc-minimal4"
    )


def installed(folders: Sequence[str]) -> str | None:
    """Path of the best library there is."""
    # Imported here: every command reads this file, and few train.
    from glob import glob

    paths = (path for name in LIBRARIES for folder in folders for path in sorted(glob(f"{folder}/{name}")))
    return next(paths, None)


def with_allocator(environment: Mapping[str, str], library: str | None) -> dict[str, str] | None:
    """The environment with the library loaded first; None: it loads an allocator as it is, or there is none to load."""
    if library is None or _loads_one(environment):
        return None
    return {**environment, PRELOAD: f"{library}:{environment.get(PRELOAD, '')}".rstrip(":")}


def _loads_one(environment: Mapping[str, str]) -> bool:
    return "malloc" in environment.get(PRELOAD, "")
