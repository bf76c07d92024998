"""What whole runs start from: a tiny model, data and recipe. Modules that need others define fixtures of the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import tiny_folder, tiny_jsonl, tiny_recipe
from unmask.train.recipe import Recipe


@pytest.fixture(scope="session", autouse=True)
def _plain_plots(plain_plots: None) -> None:
    """No plots; see tests/conftest.py."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model")
    tiny_jsonl(folder / "data.jsonl")
    return folder


@pytest.fixture
def recipe(base: Path) -> Recipe:
    return tiny_recipe(base / "model", base / "data.jsonl")
