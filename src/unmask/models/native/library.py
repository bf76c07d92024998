"""The library of CPU kernels that a process uses: the best variant that was built and that the processor runs.

Owns the choice; `UNMASK_KERNELS` names a variant. Compiles nothing: that is `build`'s, at installation.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

from unmask.errors import BackendError, ConfigError
from unmask.models.native.interface import Kernels
from unmask.models.native.variants import LIBRARIES, library_name, variants_of


def load_kernels(name: str | None = None) -> Kernels:
    """The kernels, loaded once.

    Args:
        name: a variant; None: `$UNMASK_KERNELS`, else the best.

    Raises:
        BackendError: no variant was built, or none for this processor.
        ConfigError: no variant has the name, or the processor does not run it.
    """
    return _load_once(name or os.environ.get("UNMASK_KERNELS") or None)


def kernel_variant() -> str | None:
    """Name of the variant that `load_kernels` takes; None: there are no kernels, and PyTorch computes.

    Raises:
        ConfigError: as of `load_kernels`.
    """
    try:
        return load_kernels().variant
    except BackendError:
        return None


def find_kernels(folder: Path, name: str | None = None, machine: str | None = None) -> Kernels:
    """The kernels in a folder of libraries; see `load_kernels`.

    Args:
        folder: as `build.compile_kernels` fills it.
        name: a variant; None: the best that runs.
        machine: kind of processor; None: this one's.
    """
    machine = machine or platform.machine()
    variants = variants_of(machine)
    if not variants:
        raise BackendError(f"the CPU kernels are written for x86-64 and ARM processors, not for {machine}; use plain PyTorch")
    if name is not None and name not in variants:
        raise ConfigError(f"UNMASK_KERNELS is {name!r}; it must be one of {', '.join(variants)}")
    paths = {variant: folder / library_name(variant, flags) for variant, flags in reversed(variants.items())}
    built = [variant for variant, path in paths.items() if path.exists() and name in (None, variant)]
    if not built:
        why = "were built from other sources" if any(folder.glob("*.so")) and name is None else "are not built"
        raise BackendError(
            f"the CPU kernels {why}; install unmask from a wheel, or again with a C++ compiler (in a checkout: make kernels)"
        )
    for variant in built:
        library = _open(paths[variant])
        if library.unmask_usable():
            return Kernels(library, variant)
    if name is None:
        raise BackendError(
            f"this processor runs none of the CPU kernels that were built ({', '.join(built)}); use plain PyTorch"
        )
    raise ConfigError(f"UNMASK_KERNELS is {name!r}, which this processor does not run; leave it out for the best that it runs")


@cache
def _load_once(name: str | None) -> Kernels:
    return find_kernels(LIBRARIES, name)


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"the CPU kernels cannot be loaded ({error}); install unmask again") from error
