"""Isolation levels of the sandbox: what this machine permits, and what each level prevents.

Owns the choice of level. Three levels, best first:

- `namespaces` (root, or a kernel that lets users make user namespaces): no network at all, not even loopback; a root file
  system of its own with the interpreter, the system's libraries and an empty folder in memory (bounded in bytes and files); a
  process table of its own, so that nothing outside can be signalled and everything dies with its first process.
- `landlock` (Linux 5.13): files as above, except that the folder is on disk and bounded only per file; no TCP from Linux
  6.7, no signals to other processes from Linux 6.12; UDP and named UNIX sockets stay open.
- `limits`: resource limits and killing only.

Root always runs programs as a user id that nobody has; below `namespaces` that alone protects other processes, bounds forks
and makes the final kill complete. An ordinary user without namespaces gets that kill by best effort. No level promises more
than this: the kernel is shared, and memory is bounded per process, so that a hostile program can hold a multiple of it.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Literal

from unmask.errors import BackendError, ConfigError, UnmaskWarning
from unmask.eval.sandbox.process import Level, Limits, run


@dataclass(frozen=True)
class Isolation:
    """What the sandbox prevents on this machine.

    Attributes:
        level: the mechanism.
        network: what a program can reach: nothing, everything but TCP, or everything.
        files: it cannot read the home folder, nor write outside its own folder.
        signals: it cannot signal other processes.
        forks: the number of its processes is limited.
        complete_kill: none of its processes can outlive the run.
    """

    level: Level
    network: Literal["none", "no TCP", "open"]
    files: bool
    signals: bool
    forks: bool
    complete_kill: bool

    @property
    def missing(self) -> tuple[str, ...]:
        """What a program could do that it should not."""
        risks = {
            "use the network": self.network == "open",
            "use the network, TCP excepted": self.network == "no TCP",
            "read your files and write outside its folder": not self.files,
            "kill your processes": not self.signals,
            "start any number of processes": not self.forks,
            "leave a process behind": not self.complete_kill,
        }
        return tuple(risk for risk, real in risks.items() if real)


@cache
def isolation() -> Isolation:
    """The best level that works here, determined by running an empty program; warns of what it does not prevent.

    Raises:
        ConfigError: the system is not Linux.
        BackendError: not even resource limits work.
    """
    if sys.platform != "linux":
        raise ConfigError(f"programs run in a sandbox on Linux only, not on {sys.platform}; use a Linux container")
    for level in ("namespaces", "landlock"):
        with suppress(BackendError):
            best = probe(level)
            break
    else:
        best = probe("limits")
    if best.missing:
        risks = "; ".join(best.missing)
        text = f"the sandbox for programs is weak here ({best.level}), a program could: {risks}; allow user namespaces"
        warnings.warn(text, UnmaskWarning, stacklevel=2)
    return best


def probe(level: Level) -> Isolation:
    """What one level prevents on this machine.

    Raises:
        BackendError: it does not work here.
    """
    outcome, facts = run("", "", Limits(seconds=60, cpu_seconds=30), level)
    if outcome.status != "passed":
        raise BackendError(f"the sandbox ({level}) cannot run an empty program: {outcome.status}, {outcome.stderr[-300:]!r}")
    inside, user, landlock = level == "namespaces", bool(facts["user"]), int(facts["landlock"]) if level == "landlock" else 0
    return Isolation(
        level,
        "none" if inside else "no TCP" if landlock >= 4 else "open",
        files=inside or landlock > 0,
        signals=inside or user or landlock >= 6,
        forks=inside or user or os.geteuid() != 0,
        complete_kill=inside or user,
    )
