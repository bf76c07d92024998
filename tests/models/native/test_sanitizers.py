"""The kernels from several threads, built under ThreadSanitizer, and under AddressSanitizer with UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from unmask.models.native.variants import SOURCES

SOURCE = Path(__file__).with_name("stress.cpp")
FLAGS = ("-O1", "-g", "-march=native", "-std=c++17", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_overlapping_calls_neither_race_nor_leave_their_memory(tmp_path: Path, sanitizer: str) -> None:
    program, unlinked = tmp_path / "stress", tmp_path / "stress.o"
    compile_ = ["g++", *FLAGS, f"-fsanitize={sanitizer}", f"-I{SOURCES}", "-c", str(SOURCE), "-o", str(unlinked)]
    link = ["g++", f"-fsanitize={sanitizer}", str(unlinked), "-pthread", "-o", str(program)]
    for command in (compile_, link, [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr[:4000]
