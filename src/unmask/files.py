"""Atomic file writing: a crash or a full disk never leaves a damaged file; and JSON files.

Owns temporary names, fsync and rename. Knows nothing of what is written. Every failure of the operating system leaves here as
`CheckpointError`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from unmask.errors import CheckpointError

Writer = Callable[[BinaryIO], object]
"""Writes the content of a file to it, open in binary mode."""


def atomic_write(path: Path, writer: Writer, *, synced: bool = True) -> None:
    """Write a file completely or not at all.

    The bytes go to a temporary file beside `path`, are forced to disk, and replace `path` in one rename. When anything
    fails, an interrupt included, the temporary file is removed and an older `path` stays as it was.

    Args:
        path: the file to make or replace; its folder is made when absent.
        writer: writes the content to an open binary file.
        synced: False: nothing is forced to disk, so a power cut may leave a damaged file.

    Raises:
        CheckpointError: the disk is full, read-only, or refuses for another reason.
    """
    temporary = path.with_name(_temporary_name(path))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent, path)
        try:
            if synced:
                write_synced(temporary, writer)
            else:
                with temporary.open("wb") as file:
                    writer(file)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if synced:
            sync_folder(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, completely or not at all (see `atomic_write`)."""
    atomic_write(path, json_writer(value))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; give a folder in the Hugging Face layout") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch or save the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch or save it again")
    return value


def cut_torn_line(path: Path, check: Callable[[bytes, int], None] = lambda torn, number: None) -> list[bytes]:
    """The whole lines of a file, without their ends; what a killed writer left behind the last of them is cut off.

    Args:
        path: of the file.
        check: given what would be cut off and the number of its line, from 1; may raise.
    """
    # Not `splitlines`: a line may hold other separators.
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        check(torn, len(lines) + 1)
        os.truncate(path, sum(len(line) + 1 for line in lines))
    return lines


def json_writer(value: Any) -> Writer:
    """A writer of `value` as indented JSON with a final newline."""
    return bytes_writer((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def bytes_writer(content: bytes) -> Writer:
    """A writer, as `atomic_write` takes it, of these bytes."""
    return lambda file: file.write(content)


def write_synced(path: Path, writer: Writer) -> None:
    """Write a file and force it to disk. For files in a staging folder; elsewhere use `atomic_write`."""
    with path.open("wb") as file:
        writer(file)
        file.flush()
        os.fsync(file.fileno())


def write_folder(folder: Path, writers: Mapping[str, Writer], *, exchange: Callable[[Path], None] | None = None) -> None:
    """Write the files of a folder, all or none.

    They are written to a staging folder and synced before anything in `folder` is touched. A new folder then appears by one
    rename; in an existing one every file is replaced by a rename, other files stay.

    Args:
        folder: new, or one whose files of these names are replaced.
        writers: of each file by name, called in this order.
        exchange: moves the files out of the staging folder it is given; None: one by one, in the order of `writers`.

    Raises:
        CheckpointError: the disk is full or refuses; nothing is left behind.
    """
    with staging_folder(folder) as stage, disk_errors(folder):
        for name, writer in writers.items():
            write_synced(stage / name, writer)
        sync_folder(stage)
        if stage.parent != folder:
            os.rename(stage, folder)
        elif exchange is not None:
            exchange(stage)
        else:
            for name in writers:
                os.replace(stage / name, folder / name)
        sync_folder(folder.parent)


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """An empty folder to build in, removed on leaving however that happens.

    It lies beside `target` when `target` is new and inside it when `target` exists, so that moving files out of it is a
    rename. Folders left by a process of this machine that is gone are removed first.
    """
    parent = target if target.is_dir() else target.parent
    stage = parent / _temporary_name(target)
    with disk_errors(target):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, target)
        stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn operating-system errors while writing `path` into one-line `CheckpointError`s."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space left while writing {path}; nothing was replaced; free some space and save again"
            ) from error
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; choose another folder or fix its permissions") from error


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to disk: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> str:
    """A hidden name that says who is writing, and is unique among that process's threads."""
    return f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}"


def _prefix(path: Path) -> str:
    return f".{path.name}.unmask-tmp-{socket.gethostname()}-"


def _remove_abandoned(parent: Path, target: Path) -> None:
    """Delete what a killed process left while writing `target`; another machine's processes cannot be judged from here."""
    for entry in parent.iterdir():
        if not entry.name.startswith(_prefix(target)):
            continue
        pid = entry.name.removeprefix(_prefix(target)).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        except (ValueError, PermissionError):
            pass  # not a name of ours, or another user's running process
