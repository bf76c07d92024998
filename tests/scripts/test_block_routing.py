"""The study of block routing: more of its experts are used the more are allowed, and all of them change least."""

from __future__ import annotations

import json
from pathlib import Path

import block_routing
import pytest

from helpers import refused
from runs import tiny_folder
from unmask.errors import ConfigError


def test_costs_of_a_tiny_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "model")
    options = ["--experts", "8", "--groups", "2", "--noise", "0.5", "--capacities", "8,5,4", "--windows", "1"]
    block_routing.main(["--model", str(model), *options, "--json"])
    own, *limited = json.loads(capsys.readouterr().out)
    assert (own["capacity"], own["noise"]) == (None, 0.5)
    assert [each["capacity"] for each in limited] == [8, 5, 4]
    assert [each["experts"] for each in limited] == sorted((each["experts"] for each in limited), reverse=True)
    assert limited[-1]["experts"] == 4
    assert all(0 < each["same_likeliest"] < 1 for each in limited)


def test_a_diffusion_model_is_refused(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", mask_id=3, block_size=4)
    with refused(ConfigError, "diffusion"):
        block_routing.main(["--model", str(model)])
