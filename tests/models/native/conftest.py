"""The CPU kernels, in the variant that this machine takes and in every one that it runs."""

from __future__ import annotations

import platform

import pytest

from unmask.errors import BackendError, ConfigError
from unmask.models.native.interface import Kernels
from unmask.models.native.library import load_kernels
from unmask.models.native.variants import variants_of


@pytest.fixture(scope="session", params=variants_of(platform.machine()))
def any_kernels(request: pytest.FixtureRequest) -> Kernels:
    return _load(request.param)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return _load(None)


def _load(name: str | None) -> Kernels:
    try:
        return load_kernels(name)
    except (BackendError, ConfigError) as error:
        pytest.skip(str(error))
