"""Errors that no restart mends, under torchrun, which starts ranks again whatever ended them: recorded in its agents' store.

Ranks that are started again find the record and end with the same status. Knows nothing of what failed.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_STATUS, _PRINTED, _NAME = "unmask/status", "unmask/printed", "unmask/name"
_PATIENCE = timedelta(seconds=10)

T = TypeVar("T")


def record_fatal(status: int) -> None:
    """Record the status with which this rank, and all that are started in its place, end."""
    _ask(lambda store: store.set(_STATUS, str(status)), None)


def fatal_status() -> int | None:
    """The status that a rank has recorded before this one was started; None: there is no record."""
    return _ask(lambda store: int(store.get(_STATUS)) if store.check([_STATUS]) else None, None)


def is_first_print() -> bool:
    """Whether nothing has been printed on this machine of the error that ends the job; each call counts as a print."""
    return _ask(lambda store: bool(store.add(f"{_PRINTED}/{socket.gethostname()}", 1) == 1), True)


def store_name() -> str:
    """The name of the agents' store, which the first who asks makes; empty without one."""
    return _ask(lambda store: store.compare_set(_NAME, "", uuid.uuid4().hex).decode(), "")


def _ask(question: Callable[[Store], T], default: T) -> T:
    """The answer of the store that outlives the ranks; the default without agents, or when they are gone."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return default
    from torch._C._distributed_c10d import TCPStore

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return question(TCPStore(host, port, is_master=False, timeout=_PATIENCE, wait_for_workers=False))
    except RuntimeError:
        return default
