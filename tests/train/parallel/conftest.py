"""The pool of processes that all tests of a pytest worker share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from processes import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    members = Pool()
    yield members
    members.close()
