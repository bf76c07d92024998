"""Launching the ranks of one machine: torchrun's elastic agent, inside this process.

Owns how ranks are started, restarted and stopped, where they log, and how an error of theirs becomes one of the launcher's.
Knows nothing of what they run.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from unmask.cores import num_cores
from unmask.errors import LostRanksError, TrainingError, UnmaskError, error_of_user

_STOP = "stop"
_FATAL, _LOST = "fatal", "lost"
_GRACE = 10
"""Seconds that ranks have to end when they are told to, before they are killed."""
_NOTICE = 2.0
"""Seconds within which the launcher, when it gets the same signal as the ranks, asks them to stop."""


class Launcher:
    """Launcher of ranks on this machine, which are restarted together when one of them is lost.

    Args:
        ranks: number of processes.
        max_restarts: how often they are started again.
        logs: folder for what all but the first of them print.
    """

    def __init__(self, ranks: int, *, max_restarts: int, logs: Path) -> None:
        self._ranks, self._max_restarts, self._logs = ranks, max_restarts, logs
        self._folder = tempfile.TemporaryDirectory(prefix="unmask-ranks-")
        self._files = Path(self._folder.name)

    def stop(self) -> None:
        """Ask the ranks to stop; may be called from a signal handler."""
        (self._files / _STOP).touch()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function(should_stop, *args)` in every rank.

        Args:
            function: importable; `should_stop` is a function that is true after `stop`, and when this process has been killed.
            args: picklable, as must be the result.

        Returns:
            The result of the first rank.

        Raises:
            UnmaskError: that of a rank; nothing is started again for it.
            TrainingError: ranks were lost more than `max_restarts` times.
        """
        _prepare_environment(self._ranks)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=self._ranks, run_id=uuid.uuid4().hex[:8], rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=self._max_restarts, start_method="spawn",
            logs_specs=DefaultLogsSpecs(str(self._logs), redirects=dict.fromkeys(range(1, self._ranks), Std.ALL)),
            signals_to_handle="SIGHUP", shutdown_timeout=_GRACE,
        )  # fmt: skip
        with self._folder:
            try:
                results = elastic_launch(config, _serve)(self._folder.name, os.getpid(), function, args)
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                lost = TrainingError(f"rank {rank} ended with exit code {failure.exitcode}; what it printed is in {self._logs}")
                raise _error_of(self._files, _FATAL) or _error_of(self._files, _LOST) or lost from error
            if (fatal := _error_of(self._files, _FATAL)) is not None:
                raise fatal
            return results[0]


def _prepare_environment(ranks: int) -> None:
    """What the ranks inherit: their share of the cores, and gloo on the loopback device."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // ranks)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # What the agent reports of a failed rank is in the launcher's own error.
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _serve(name: str, launcher: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Run the function in this rank; an error that the user must mend ends all ranks, and is the same when they start again.

    `launcher` is the id of its process.
    """
    folder, rank = Path(name), int(os.environ["RANK"])

    def should_stop() -> bool:
        # Ranks outlive a launcher that is killed.
        return (folder / _STOP).exists() or os.getppid() != launcher

    # Ctrl-C reaches the whole foreground group, but it is the launcher that tells the ranks to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _handle_sigterm(folder / _STOP)
    if _error_of(folder, _FATAL) is not None:
        return None
    try:
        return function(should_stop, *args)
    except LostRanksError as error:
        _leave(folder / f"{_LOST}-{rank}", error)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != os.environ["TORCHELASTIC_MAX_RESTARTS"]:
            print(f"note: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # A thread may wait for those that are gone.
    except Exception as error:
        found = None if isinstance(error, ConnectionError | TimeoutError) else error_of_user(error)
        if found is not None:
            _leave(folder / f"{_FATAL}-{rank}", found)
            return None
        traceback.print_exc()
        _leave(folder / f"{_LOST}-{rank}", TrainingError(f"rank {rank} failed: {' '.join(repr(error).split())}"))
        raise SystemExit(1) from error
    finally:
        if os.getppid() != launcher:
            os._exit(1)  # PyTorch would wait until the launcher has read the result.


def _handle_sigterm(stop: Path) -> None:
    """At SIGTERM end this rank, unless the launcher has got it, too, and asks the ranks to stop.

    A thread does it: the main one may wait in a collective operation for a rank that is gone.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def obey() -> None:
        while os.read(reader, 1):
            received = time.time()
            while not stop.exists() and time.time() < received + _NOTICE:
                time.sleep(0.05)
            # A request that is older was another one; now the launcher ends the ranks.
            if not stop.exists() or stop.stat().st_mtime < received - _NOTICE:
                os._exit(128 + signal.SIGTERM)

    Thread(target=obey, daemon=True).start()


def _leave(path: Path, error: UnmaskError) -> None:
    """Leave an error to the launcher; the file is there only when it is complete."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(error))
    partial.rename(path)


def _error_of(folder: Path, kind: str) -> UnmaskError | None:
    """The error of this kind that the lowest rank has left."""
    errors = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{kind}-*")) if not path.suffix]
    return errors[0] if errors else None
