"""The allocator that training on a CPU is started with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from unmask.cli import allocator


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What a process would be replaced by, on a machine with jemalloc alone."""
    (tmp_path / "libjemalloc.so.2").touch()
    replaced: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "execve", lambda *what: replaced.append(what))
    monkeypatch.setattr(allocator, "FOLDERS", (str(tmp_path / "none"), str(tmp_path)))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    return replaced


def test_training_is_started_anew_once(started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "unmask", "sft", "--out", "x"])
    allocator.start_anew_with_allocator(["unmask", "sft", "--out", "x"])
    ((program, command, environment),) = started
    assert (program, command) == (sys.executable, [sys.executable, "-X", "dev", "unmask", "sft", "--out", "x"])
    assert environment["LD_PRELOAD"] == str(tmp_path / "libjemalloc.so.2")
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("LD_PRELOAD", environment["LD_PRELOAD"])
    allocator.start_anew_with_allocator(["unmask", "sft", "--out", "x"])
    assert len(started) == 1


@pytest.mark.parametrize("argv", [["unmask"], ["unmask", "generate", "convert"], ["unmask", "--help", "sft"]])
def test_other_verbs_go_on_as_they_are(started: list[tuple[Any, ...]], argv: list[str]) -> None:
    allocator.start_anew_with_allocator(argv)
    assert not started


def test_where_there_is_none_nothing_happens(started: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "libjemalloc.so.2").unlink()
    allocator.start_anew_with_allocator(["unmask", "convert"])
    assert not started


def test_the_best_comes_first_and_other_libraries_stay(tmp_path: Path) -> None:
    for name in ("libjemalloc.so.2", "libtcmalloc_minimal.so.4"):
        (tmp_path / name).touch()
    best = allocator.installed([str(tmp_path)])
    assert best == str(tmp_path / "libtcmalloc_minimal.so.4")
    assert allocator.with_allocator({"LD_PRELOAD": "/lib/other.so"}, best) == {"LD_PRELOAD": f"{best}:/lib/other.so"}
    assert allocator.with_allocator({"LD_PRELOAD": "/opt/libmimalloc.so"}, best) is None


def test_a_long_run_without_one_is_told_how_to_get_one(started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "libtcmalloc" in str(allocator.hint(allocator.LONG))
    assert allocator.hint(allocator.LONG - 1) is None
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert allocator.hint(allocator.LONG) is None
