"""The compiled kernels, in the variant of this machine and in those of lesser ones; compiled once and kept in the cache."""

from __future__ import annotations

import pytest

from unmask.errors import BackendError
from unmask.models.native.build import start_build
from unmask.models.native.interface import Kernels

VARIANTS = {"native": (), "avx2": ("-mno-avx512f",), "portable": ("-DUNMASK_PORTABLE",)}
SLOW = ("portable",)  # half a minute to compile


@pytest.fixture(
    scope="session", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS]
)
def any_kernels(request: pytest.FixtureRequest) -> Kernels:
    return _load(*VARIANTS[request.param])


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return _load()


def _load(*flags: str) -> Kernels:
    try:
        build = start_build(flags=flags)
    except BackendError as error:
        pytest.skip(str(error))
    return Kernels(build.load())
