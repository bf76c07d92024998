"""The lock of a run's folder: two jobs never write into one. Its file names the job that began the run."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unmask.errors import ConfigError, UnmaskError

_NAME = ".lock"


@contextmanager
def locked(folder: Path, job: str = "") -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there; the system releases it when the process ends.

    Args:
        folder: of the run.
        job: name of the job, which stays in the file when the process is killed or other ranks are lost.

    Raises:
        ConfigError: another job holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _NAME).open("a")
    except OSError as error:
        raise ConfigError(f"folder {folder} cannot be written: {error.strerror or error}; choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / _NAME).write_text(job)
        except BlockingIOError as error:
            raise ConfigError(f"another job is writing into {folder}; wait for it, or choose another folder") from error
        except OSError as error:
            raise ConfigError(f"folder {folder} cannot be locked: {error.strerror or error}; choose another folder") from error
        try:
            yield
        except UnmaskError:
            file.truncate(0)
            raise
        file.truncate(0)


def job_of(folder: Path) -> str:
    """Name of the job that began the run in this folder and has not ended it; empty: none."""
    try:
        return (folder / _NAME).read_text()
    except OSError:
        return ""
