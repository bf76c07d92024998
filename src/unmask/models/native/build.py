"""Compilation of the C++ kernels on the user's machine, once, and loading them.

Owns the compiler's command line and the cache of compiled libraries. Knows nothing of models: what the functions mean is in
`packed`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unmask.errors import BackendError
from unmask.models.weights.hub import cache_folder

_SOURCE = Path(__file__).parent / "kernels.cpp"
# Whether a * b + c is contracted is up to the compiler, tile by tile; the kernels promise the same bits in every tile.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
# Part of a library's key, so that a cache shared by several machines never serves an illegal instruction (-march=native).
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")


@dataclass(frozen=True)
class Build:
    """A compilation under way or finished; `process` is None when the library was already there."""

    library: Path
    log: Path
    process: subprocess.Popen[bytes] | None

    @property
    def running(self) -> bool:
        """Whether the compiler is still at work."""
        return self.process is not None and self.process.poll() is None

    def load(self) -> ctypes.CDLL:
        """The compiled library; waits for the compiler where it still runs.

        Raises:
            BackendError: the compiler failed, or the library cannot be loaded.
        """
        if self.process is not None and self.process.wait() != 0:
            lines = self.log.read_text(errors="replace").splitlines()
            reason = next((line for line in lines if "error" in line), "no message")
            raise BackendError(f"the CPU kernels did not compile ({reason}); set CXX to a C++17 compiler with OpenMP")
        try:
            return ctypes.CDLL(str(self.library))
        except OSError as error:
            raise BackendError(f"the compiled CPU kernels cannot be loaded ({error}); delete {self.library}") from error


def start_build(*, cache: Path | None = None, flags: Sequence[str] = ()) -> Build:
    """Start the compiler in a separate process, unless the cache holds a library of the same source, flags and processor.

    Args:
        cache: folder of compiled libraries; None: as of `hub.cache_folder`.
        flags: further compiler flags, for tests of the portable variants.

    Returns:
        The build; call `load` when it is no longer running.

    Raises:
        BackendError: the processor or the system is not one the kernels are written for, or there is no compiler.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise BackendError(
            f"the CPU kernels run on x86-64 Linux, not on {platform.machine()} {sys.platform}; use plain PyTorch"
        )
    compiler = _compiler()
    command = [*compiler, *_FLAGS, *flags]
    openmp = _openmp_library()
    folder = cache_folder(cache) / "native"
    library = folder / f"kernels-{build_key(command, openmp)}.so"
    log = library.with_suffix(".log")
    if library.exists():
        return Build(library, log, None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"no folder for the compiled CPU kernels ({error}); set UNMASK_CACHE to one") from error
    temporary = library.with_suffix(f".{os.getpid()}.tmp")
    # Two steps, because -fopenmp when linking would bring in the system's OpenMP beside the one torch has loaded.
    compile_ = [*command, "-c", str(_SOURCE), "-o", f"{temporary}.o"]
    link = [*compiler, "-shared", f"{temporary}.o", "-o", str(temporary), openmp]
    steps = (compile_, link, ["mv", str(temporary), str(library)])
    clean = shlex.join(["rm", "-f", str(temporary), f"{temporary}.o"])
    script = f"{' && '.join(map(shlex.join, steps))}; status=$?; {clean}; exit $status"
    try:
        with log.open("wb") as errors:
            process = subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.DEVNULL, stderr=errors)
    except OSError as error:
        raise BackendError(f"the C++ compiler did not start ({error}); use plain PyTorch") from error
    return Build(library, log, process)


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for candidate in (named,) if named else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(candidate[0]):
            return candidate
    what = f"CXX={named[0]} is not there" if named else "there is no c++, g++ or clang++"
    raise BackendError(f"{what}; install a C++ compiler for the fast CPU kernels, or use plain PyTorch")


def _openmp_library() -> str:
    """Path of the OpenMP runtime that torch has loaded, so that both share one thread pool; else the compiler's flag."""
    paths = {f"/{line.partition('/')[2]}" for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")))
    # Other packages may have brought their own.
    torchs = [path for path in runtimes if Path(torch.__file__).parent.parent in Path(path).parents and "torch" in path]
    return (torchs or runtimes or ["-fopenmp"])[0]


def build_key(command: Sequence[str], openmp: str) -> str:
    """A hash of all that the compiled library depends on: the compiler, the command, the processor and the sources."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    cpuinfo = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    cpu = [line for line in cpuinfo if line.partition(":")[0].strip() in _CPU_FIELDS]
    digest = hashlib.sha256(repr((list(command), version, openmp, cpu)).encode())
    for source in sorted(path for path in _SOURCE.parent.iterdir() if path.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
