"""Everything a user can do wrong, as exceptions whose message is one line: value, rule, remedy.

Owns the exception types, and the locations in their messages; knows no other module of the package. The CLI prints the message
and exits with `exit_code`; anything that is *not* an `UnmaskError` is our bug and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class UnmaskError(Exception):
    """Base of every error a user can cause; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(UnmaskError):
    """A recipe, a model configuration or a command-line value breaks a rule."""


class CheckpointError(UnmaskError):
    """A checkpoint is missing, incomplete, corrupt, or does not fit the model."""


class DataError(UnmaskError):
    """A data source cannot be read, is empty, or holds something training must not see."""


class RequestError(UnmaskError):
    """A generation request cannot be served: too long, out of range, or not expressible by this model."""


class TrainingError(UnmaskError):
    """A job started correctly and failed: non-finite loss, disk full, interrupted."""

    exit_code = 1


class LostRanksError(TrainingError):
    """Other processes of a run did not answer. Started again, the run goes on from its last checkpoint."""


class BackendError(UnmaskError):
    """A compute backend cannot be used on this machine: not built, or not written for the processor."""


class RoomError(UnmaskError):
    """A model, its KV cache or its training needs more memory than there is."""


class UnmaskWarning(UserWarning):
    """Something works, but not in the way that was asked for."""


class UnmaskNote(Warning):
    """Something takes its time, once; nothing is wrong."""


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def error_of_user(error: BaseException) -> UnmaskError | None:
    """What an exception means to the user, where it is one of ours, of the disk or of the memory; None: it is a bug."""
    if isinstance(error, UnmaskError):
        return error
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        path = "" if error.filename is None else f"{error.filename}: "
        if error.errno in _DISK_FULL:
            return TrainingError(f"{path}no space left on the disk; free some and run the command again")
        return TrainingError(f"{path}{error.strerror or error}; check the path and its permissions")
    no_memory = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        return TrainingError("out of memory; use a smaller model, dtype bfloat16, or a lower train.micro_rows")
    return None


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put a location, such as a file and a line, before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
