"""A write that fails leaves the old file, no new one, and no leftovers."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import BinaryIO

import pytest

from helpers import refused
from unmask.errors import CheckpointError
from unmask.files import atomic_write, atomic_write_json, bytes_writer, cut_torn_line, disk_errors, staging_folder


def full_disk(file: BinaryIO) -> None:
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(file: BinaryIO) -> None:
    file.write(b"half of it")
    raise KeyboardInterrupt


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    atomic_write(path, bytes_writer(b"one"))
    atomic_write(path, bytes_writer(b"two"))
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_json_ends_with_a_newline_and_keeps_letters(tmp_path: Path) -> None:
    atomic_write_json(tmp_path / "a.json", {"name": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with refused(CheckpointError, path, "space"):
        atomic_write(path, full_disk)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupt_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_appears_only_after_the_content_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "file", []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", path.exists())), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", path.exists())), real_replace(a, b))[1])
    atomic_write(path, bytes_writer(b"content"))
    assert events == [("fsync", False), ("replace", False), ("fsync", True)]


def test_a_folder_in_the_way_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with refused(CheckpointError, tmp_path / "file"):
        atomic_write(tmp_path / "file", bytes_writer(b""))


def test_staging_lies_beside_a_new_target_and_inside_an_old_one(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "new") as stage:
        assert stage.parent == tmp_path
    (tmp_path / "old").mkdir()
    with staging_folder(tmp_path / "old") as stage:
        assert stage.parent == tmp_path / "old"
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*"))


def test_what_a_dead_process_left_is_cleared(tmp_path: Path) -> None:
    dead_pid = 2**22 + 1  # beyond the kernel's largest process id
    prefix = f".m.unmask-tmp-{socket.gethostname()}-"
    dead, alive, own = (tmp_path / f"{prefix}{pid}-ab" for pid in (dead_pid, os.getppid(), os.getpid()))
    other_host, other_file = tmp_path / ".m.unmask-tmp-elsewhere-1-ab", tmp_path / prefix.replace(".m.", ".n.")
    for folder in (dead, alive, own, other_host, other_file):
        folder.mkdir()
    with staging_folder(tmp_path / "m"):
        assert not dead.exists()
    dead.touch()
    atomic_write(tmp_path / "m", bytes_writer(b""))
    assert not dead.exists()
    assert all(folder.exists() for folder in (alive, own, other_host, other_file))


def test_two_threads_may_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def outer(file: BinaryIO) -> None:
        atomic_write(path, bytes_writer(b"inner"))
        file.write(b"outer")

    atomic_write(path, outer)
    assert path.read_bytes() == b"outer"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_errors_pass_other_errors_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("one\u2028\ntwö\nthr".encode())
    assert [line.decode() for line in cut_torn_line(path)] == ["one\u2028", "twö"]
    assert path.read_text(encoding="utf-8") == "one\u2028\ntwö\n"
    path.write_text("no line end")
    with pytest.raises(ZeroDivisionError):
        cut_torn_line(path, lambda torn, number: number // 0)
    assert cut_torn_line(path) == []
    assert path.read_text() == ""
