"""Compilation of the CPU kernels when the package is installed, for this machine or for another.

    python -m unmask.models.native.build [--target aarch64-linux] [--folder libraries] [VARIANT ...]

Owns the compiler's command lines and the tags of wheels. hatch_build.py calls it; imports nothing but the standard library.
What is compiled is `variants`', which library is used is `library`'s.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from unmask.models.native.variants import ARMV8_2, FLAGS, LIBRARIES, SOURCES, library_name, usable_macro, variants_of

# Cross compilation by PyPI's ziglang, to the oldest systems that PyTorch's wheels run on.
TARGETS = {
    "x86_64-linux": "x86_64-linux-gnu.2.28",
    "aarch64-linux": "aarch64-linux-gnu.2.28",
    "aarch64-macos": "aarch64-macos.11.0",
}


class CompilerError(Exception):
    """There is no compiler, or it failed."""


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Attributes:
        machine: its processor, as of `platform.machine()`.
        compiler: the command of its C++ compiler.
        platform: tag of its wheels; None: Linux, with the C library that the compiled libraries need.
        link: flags of the linker: nothing of C++ is asked of the machine that the library runs on.
        armv8_2: the compiler's word for that architecture.
    """

    machine: str
    compiler: tuple[str, ...]
    platform: str | None
    link: tuple[str, ...]
    armv8_2: str = ARMV8_2

    def tag(self, libraries: Sequence[Path]) -> str:
        """The wheel's tag: any Python 3, no ABI of Python's, this platform."""
        if self.platform is not None:
            return f"py3-none-{self.platform}"
        needed = [int(minor) for path in libraries for minor in re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())]
        return f"py3-none-{f'manylinux_2_{max(17, *needed)}' if needed else 'linux'}_{self.machine}"


def find_target(name: str | None = None) -> Target:
    """One of TARGETS, or this machine.

    Raises:
        CompilerError: another name, or no compiler.
    """
    if name is not None:
        if name not in TARGETS:
            raise CompilerError(f"target {name!r} is unknown; use one of {', '.join(TARGETS)}")
        machine = name.partition("-")[0]
        compiler = (sys.executable, "-m", "ziglang", "c++", "-target", TARGETS[name])
        wheel = "macosx_11_0_arm64" if name.endswith("macos") else None
        return Target(machine, compiler, wheel, ("-nostdlib++",), "-mcpu=generic+v8_2a")
    if platform.system() == "Linux":
        return Target(platform.machine(), _compiler(), None, ("-static-libstdc++", "-static-libgcc"))
    return Target(platform.machine(), _compiler(), re.sub(r"[-.]", "_", sysconfig.get_platform()), ())


def _compiler() -> tuple[str, ...]:
    named = tuple(shlex.split(os.environ.get("CXX", "")))
    for candidate in (named,) if named else (("c++",), ("g++",), ("clang++",)):
        if shutil.which(candidate[0]):
            return candidate
    raise CompilerError(f"CXX={named[0]} is not there" if named else "there is no c++, g++ or clang++")


def compile_kernels(target: Target, folder: Path, names: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """Compile the variants that a folder lacks, and remove those of other sources.

    Args:
        target: the machine and its compiler.
        folder: of the libraries.
        names: of variants; none: all for this kind of processor.

    Returns:
        The libraries that are there now, and a line about each variant that the compiler could not make.
    """
    folder.mkdir(parents=True, exist_ok=True)
    variants = {name: flags for name, flags in variants_of(target.machine).items() if not names or name in names}
    libraries, problems = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = {name: pool.submit(_update, folder, name, flags, target) for name, flags in variants.items()}
    for name, build in builds.items():
        try:
            libraries.append(build.result())
        except CompilerError as error:
            problems.append(f"kernels {name} did not compile: {error}")
    return libraries, problems


def _update(folder: Path, variant: str, flags: Sequence[str], target: Target) -> Path:
    """A variant's library in a folder, compiled if it is not there; one of other sources is removed."""
    library = folder / library_name(variant, flags)
    if not library.exists():
        compile_library(library, variant, flags, target)
    for other in folder.glob(f"{variant}-*.so"):
        if other != library:
            other.unlink(missing_ok=True)
    return library


def compile_library(library: Path, variant: str, flags: Sequence[str], target: Target) -> None:
    """Compile one library.

    Args:
        library: the file to write, at once when it is complete.
        variant: whose question `usable.cpp` answers.
        flags: of the compiler, for the kernels.
        target: the machine and its compiler.

    Raises:
        CompilerError: the compiler's first error.
    """
    flags = [flag.replace(ARMV8_2, target.armv8_2) for flag in flags]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        usable, kernels, linked = (str(Path(scratch, name)) for name in ("usable.o", "kernels.o", "linked.so"))
        for command in (
            (*FLAGS, usable_macro(variant), "-c", str(SOURCES / "usable.cpp"), "-o", usable),
            # Hidden: libraries of other programs with names like ours are none of our business.
            (*FLAGS, "-fvisibility=hidden", *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", kernels),
            ("-shared", *target.link, usable, kernels, "-pthread", "-o", linked),
        ):
            done = subprocess.run((*target.compiler, *command), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                lines = [*done.stderr.splitlines(), f"exit status {done.returncode}"]
                raise CompilerError(next((line for line in lines if "error" in line), lines[0]))
        Path(linked).replace(library)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile from the command line; says what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="all by default")
    parser.add_argument("--target", choices=TARGETS, help="another machine, through ziglang [default: this one]")
    parser.add_argument("--folder", type=Path, default=LIBRARIES)
    options = parser.parse_args(argv)
    try:
        libraries, problems = compile_kernels(find_target(options.target), options.folder, options.variants)
    except CompilerError as error:
        print(f"warning: the CPU kernels are not built: {error}; install a C++ compiler, then: make kernels", file=sys.stderr)
        return
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(f"CPU kernels: {', '.join(path.name for path in libraries) or 'none for this processor'}")


if __name__ == "__main__":
    main()
