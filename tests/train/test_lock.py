"""The lock of a run's folder: a second job is refused, and the folder is free again after the first."""

from __future__ import annotations

from pathlib import Path

from helpers import refused
from runs import tiny_recipe
from unmask.errors import ConfigError
from unmask.lock import locked
from unmask.train.run import run_recipe


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "no model", tmp_path / "no data")
    with locked(tmp_path / "run"), refused(ConfigError, "another job", tmp_path / "run"):
        run_recipe(recipe, tmp_path / "run")
    with locked(tmp_path / "run"):
        pass
