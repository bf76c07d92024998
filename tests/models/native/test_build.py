"""Compiling the kernels: once for the same sources, and with a reason when it cannot be done."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import pytest

from unmask.models.native import build, variants
from unmask.models.native.build import CompilerError, compile_kernels, find_target
from unmask.models.native.library import find_kernels
from unmask.models.native.variants import library_name, variants_of

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def only(monkeypatch: pytest.MonkeyPatch, variant: str, *flags: str) -> str:
    """Let there be one variant; the name of its library."""
    monkeypatch.setattr(variants, "VARIANTS", {platform.machine(): {variant: flags}})
    return library_name(variant, flags)


@needs_compiler
@pytest.mark.slow
def test_compiles_once_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = only(monkeypatch, "portable", "-O0")
    (tmp_path / "portable-0123456789ab.so").touch()
    libraries, problems = compile_kernels(find_target(), tmp_path)
    assert (libraries, problems) == ([tmp_path / name], [])
    assert list(tmp_path.iterdir()) == libraries
    before = libraries[0].stat()
    assert compile_kernels(find_target(), tmp_path) == (libraries, [])
    assert libraries[0].stat() == before
    assert find_kernels(tmp_path).variant == "portable"


@needs_compiler
def test_a_variant_that_does_not_compile_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "wrong", "-include", "nowhere.h")
    libraries, problems = compile_kernels(find_target(), tmp_path)
    assert libraries == []
    assert len(problems) == 1
    assert "wrong" in problems[0]
    assert "nowhere.h" in problems[0]
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_library_tells_flags_and_sources_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {library_name("a", ()), library_name("a", ("-O0",)), library_name("b", ())}
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"//")
    names.add(library_name("a", ()))
    assert len(names) == 4


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(CompilerError, match="CXX=no-such-compiler"):
        find_target()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerError, match="no c"):
        find_target()
    build.main(["--folder", str(tmp_path)])
    assert "install a C++ compiler" in capsys.readouterr().err


def test_an_unknown_target() -> None:
    with pytest.raises(CompilerError, match="riscv64-linux"):
        find_target("riscv64-linux")


@pytest.mark.parametrize(
    ("target", "content", "tag"),
    [
        ("x86_64-linux", b"GLIBC_2.14\0GLIBC_2.28\0GLIBC_2.2.5", "py3-none-manylinux_2_28_x86_64"),
        ("aarch64-linux", b"GLIBC_2.2.5", "py3-none-manylinux_2_17_aarch64"),
        ("x86_64-linux", b"musl", "py3-none-linux_x86_64"),
        ("aarch64-macos", b"", "py3-none-macosx_11_0_arm64"),
    ],
)
def test_the_tag_says_what_a_wheel_needs(target: str, content: bytes, tag: str, tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(content)
    assert find_target(target).tag([tmp_path / "library.so"]) == tag


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64"])
def test_every_supported_processor_has_variants(machine: str) -> None:
    assert variants_of(machine)
    assert not variants_of("riscv64")
