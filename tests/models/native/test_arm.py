"""The kernels' variants for ARM processors, under an emulator: the bits that x86-64 gives."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from unmask.models.native.variants import FLAGS, SOURCES, VARIANTS

SOURCE = Path(__file__).with_name("stress.cpp")
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"no {program} (Debian: {package})")
        for program, package in (("g++", "g++"), (CROSS, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user"))
    ),
]


def compiled(compiler: str, program: Path, *flags: str) -> Path:
    options = [flag for flag in FLAGS if flag not in ("-O3", "-fno-exceptions", "-fno-rtti")]
    subprocess.run(
        [compiler, "-O2", *options, *flags, "-static", "-pthread", f"-I{SOURCES}", str(SOURCE), "-o", str(program)], check=True
    )
    return program


def digests(*command: object) -> list[str]:
    done = subprocess.run([*map(str, command), "digests"], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """From the portable variant on this machine."""
    return digests(compiled("g++", tmp_path_factory.mktemp("x86") / "program"))


@pytest.mark.parametrize("variant", VARIANTS["aarch64"])
def test_forwards_and_products_are_the_same_bits(expected: list[str], tmp_path: Path, variant: str) -> None:
    program = compiled(CROSS, tmp_path / "program", *VARIANTS["aarch64"][variant])
    assert len(expected) == 12 * 45
    assert digests(EMULATOR, "-cpu", "max", program) == expected


@pytest.mark.parametrize(("variant", "runs"), [("neon", True), ("neon_dotprod", False), ("neon_i8mm", False)])
def test_an_old_processor_is_told_from_a_new_one(tmp_path: Path, variant: str, runs: bool) -> None:
    source, program = tmp_path / "ask.cpp", tmp_path / "ask"
    source.write_text('#include "usable.cpp"\nint main() { return !unmask_usable(); }\n')
    macro = f"-DUNMASK_VARIANT_{variant.upper()}"
    subprocess.run([CROSS, "-std=c++17", "-static", macro, f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    assert subprocess.run([EMULATOR, "-cpu", "max", str(program)], check=False).returncode == 0
    assert subprocess.run([EMULATOR, "-cpu", "cortex-a53", str(program)], check=False).returncode == (0 if runs else 1)
