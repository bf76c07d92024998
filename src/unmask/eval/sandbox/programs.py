"""Sandboxed execution of Python programs that a model wrote: one program, or many in parallel.

The entrance of the package. Knows no benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from unmask.cores import num_cores
from unmask.eval.sandbox.isolation import isolation
from unmask.eval.sandbox.process import Level, Limits, Outcome, run


def run_program(source: str, *, stdin: str = "", limits: Limits = Limits(), level: Level | None = None) -> Outcome:
    """Run one program as `__main__`, with this interpreter and the standard library only; it cannot hang the caller.

    It starts in an empty folder, which is its HOME and is removed afterwards, with an empty environment, a fixed hash seed and
    only the three standard file descriptors.

    Args:
        source: Python source text.
        stdin: standard input of the program.
        limits: what it may use.
        level: of isolation; the best that works here where None.

    Raises:
        ConfigError: the system is not Linux.
        BackendError: the sandbox could not be set up.
    """
    return run(source, stdin, limits, level or isolation().level)[0]


def run_many(programs: Sequence[str], *, limits: Limits = Limits()) -> list[Outcome]:
    """Run programs in parallel, one on each processor core.

    Args:
        programs: Python source texts.
        limits: of each program.

    Returns:
        The outcome of each program, in order.

    Raises:
        ConfigError: the system is not Linux.
        BackendError: the sandbox could not be set up.
    """
    level = isolation().level
    pool = ThreadPoolExecutor(num_cores())
    try:
        return list(pool.map(partial(run_program, limits=limits, level=level), programs))
    finally:
        pool.shutdown(cancel_futures=True)
