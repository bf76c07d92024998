"""Cores of the machine that a process may use."""

from __future__ import annotations

import os
import sys


def num_cores() -> int:
    """Cores that this process may use: those of its affinity, where the system has one."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
