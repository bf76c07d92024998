"""Compiling the kernels: once per machine, in a process of its own, with a reason when it cannot be done."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from helpers import refused
from unmask.errors import BackendError
from unmask.models.native import build
from unmask.models.native.build import start_build
from unmask.models.native.interface import Kernels

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)
FAST = ("-O0",)  # a different key, and quick to compile


def loaded_openmp() -> set[str]:
    maps = Path("/proc/self/maps").read_text().split()
    return {path for path in maps if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}


@needs_compiler
def test_compiles_once_and_leaves_nothing_else(tmp_path: Path) -> None:
    before = loaded_openmp()
    first = start_build(cache=tmp_path, flags=FAST)
    Kernels(first.load())
    assert loaded_openmp() == before  # torch's: one pool of threads
    assert not first.running
    assert {path.suffix for path in (tmp_path / "native").iterdir()} == {".so", ".log"}
    second = start_build(cache=tmp_path, flags=FAST)
    assert second.process is None
    assert second.library == first.library


@needs_compiler
def test_a_failed_compilation_gives_its_reason_and_can_be_tried_again(tmp_path: Path) -> None:
    started = start_build(cache=tmp_path, flags=("-DINLINE_", "-include", "nowhere.h"))
    for _ in range(2):
        with refused(BackendError, "nowhere.h"):
            started.load()
    assert not started.library.exists()
    assert {path.suffix for path in (tmp_path / "native").iterdir()} == {".log"}


@needs_compiler
def test_the_key_tells_processors_flags_and_sources_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {build.build_key(["c++"], "a"), build.build_key(["c++", "-O0"], "a"), build.build_key(["c++"], "b")}
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: read(self, *a, **k).replace("sse2", "sse2 amx_int8"))
    keys.add(build.build_key(["c++"], "a"))
    bytes_ = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: bytes_(self) + b"//")
    keys.add(build.build_key(["c++"], "a"))
    assert len(keys) == 5


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with refused(BackendError, "CXX=no-such-compiler"):
        start_build(cache=tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused(BackendError, "compiler"):
        start_build(cache=tmp_path)


def test_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with refused(BackendError, "aarch64"):
        start_build()


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    library.write_bytes(b"not a library")
    with refused(BackendError, library):
        build.Build(library, tmp_path / "kernels.log", None).load()
