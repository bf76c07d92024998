"""Variants of the C++ kernels: the instruction sets that the same sources are compiled for, each into a library of its own.

Owns their names, compiler flags and file names. `kernels.cpp` is compiled with a variant's flags, `usable.cpp` without any, but
with `usable_macro`, so that asking a library whether it can run here executes nothing that is not there. Imports nothing but
the standard library: installation needs it before there are dependencies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARIES = SOURCES / "libraries"

# Of every variant. Whether a * b + c is contracted is up to the compiler, tile by tile; the kernels promise the same bits in
# every tile.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi",
)  # fmt: skip

ARMV8_2 = "-march=armv8.2-a"
_AVX2 = ("-mavx2", "-mfma", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")

# By machine, as `platform.machine` names it; the best last.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": (),
        "avx2": _AVX2,
        "avxvnni": (*_AVX2, "-mavxvnni"),
        "avx512vnni": _AVX512,
        "amx": (*_AVX512, "-mamx-tile", "-mamx-int8"),
    },
    "aarch64": {
        "neon": (),
        "neon_dotprod": (f"{ARMV8_2}+dotprod",),
        "neon_i8mm": (f"{ARMV8_2}+dotprod+i8mm",),
    },
}


def usable_macro(variant: str) -> str:
    """The flag that tells `usable.cpp` which variant it is linked to."""
    return f"-DUNMASK_VARIANT_{variant.upper()}"


def variants_of(machine: str) -> dict[str, tuple[str, ...]]:
    """Names and flags of the variants for a kind of processor, the best last; none for one the kernels are not written for."""
    return VARIANTS.get({"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine), {})


def library_name(variant: str, flags: Sequence[str]) -> str:
    """File name of a library, which changes with everything that it is compiled from."""
    digest = hashlib.sha256(repr((FLAGS, tuple(flags))).encode())
    for source in sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    return f"{variant}-{digest.hexdigest()[:12]}.so"
