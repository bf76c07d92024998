"""Which variant of the kernels is used, and the reason when none is."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from helpers import refused
from unmask.errors import BackendError, ConfigError
from unmask.models.native import library
from unmask.models.native.library import find_kernels, kernel_variant, load_kernels
from unmask.models.native.variants import library_name, variants_of

VARIANTS = variants_of(platform.machine())


class Library:
    """A stand-in for a loaded library."""

    def __init__(self, usable: bool) -> None:
        self._usable = usable

    def __getattr__(self, name: str) -> object:
        return lambda: self._usable

    def unmask_usable(self) -> bool:
        return self._usable


def built(folder: Path, monkeypatch: pytest.MonkeyPatch, usable: set[str]) -> Path:
    """A folder with every variant, of which the processor runs some."""
    for variant, flags in VARIANTS.items():
        (folder / library_name(variant, flags)).touch()
    monkeypatch.setattr(library, "_open", lambda path: Library(path.name.partition("-")[0] in usable))
    monkeypatch.setattr(library, "Kernels", lambda library, name: name)
    return folder


def test_the_best_that_runs_is_taken_and_a_name_chooses_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *usable, best = VARIANTS
    folder = built(tmp_path, monkeypatch, set(usable))
    assert find_kernels(folder) == usable[-1]
    assert find_kernels(folder, usable[0]) == usable[0]
    with refused(ConfigError, best):
        find_kernels(folder, best)
    with refused(ConfigError, "mmx", *VARIANTS):
        find_kernels(folder, "mmx")


def test_none_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(BackendError, *VARIANTS):
        find_kernels(built(tmp_path, monkeypatch, set()))


def test_the_environment_names_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_KERNELS", "mmx")
    with refused(ConfigError, "mmx"):
        load_kernels()
    with refused(ConfigError, "mmx"):
        kernel_variant()


def test_without_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(BackendError, "not built", "make kernels"):
        find_kernels(tmp_path)
    (tmp_path / "portable-0123456789ab.so").touch()
    with refused(BackendError, "other sources"):
        find_kernels(tmp_path)
    monkeypatch.setattr(library, "load_kernels", lambda: find_kernels(tmp_path))
    assert kernel_variant() is None


def test_another_processor(tmp_path: Path) -> None:
    with refused(BackendError, "riscv64"):
        find_kernels(tmp_path, machine="riscv64")


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    variant, flags = next(iter(VARIANTS.items()))
    damaged = tmp_path / library_name(variant, flags)
    damaged.write_bytes(b"not a library")
    with refused(BackendError, damaged):
        find_kernels(tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_the_kernels_are_built() -> None:
    assert kernel_variant() in VARIANTS
