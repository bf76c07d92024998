"""The comparison of loss curves: layouts as text, differences, a table and a picture; with real processes when slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from loss_compare import largest_difference, loss_curves, plot, table

from runs import tiny_folder, tiny_jsonl, tiny_recipe
from unmask.train.parallel.dims import ParallelDims

CURVES = {"one process": {1: 3.0, 2: 2.0}, "data_shard=2": {1: 3.0, 2: 2.25}}


def test_the_largest_difference_is_shown(tmp_path: Path) -> None:
    one, two = CURVES.values()
    assert largest_difference(two, one) == 0.25
    lines = list(table(CURVES))
    assert lines[2].split() == ["2", "2.000000", "+2.5e-01"]
    assert lines[-1].split() == ["largest", "2.5e-01"]
    plot(CURVES, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="1 and 2 steps"):
        largest_difference({1: 3.0}, one)


@pytest.mark.slow
def test_layouts_have_the_curve_of_one_process(tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_folder(tmp_path / "model"), tiny_jsonl(tmp_path / "data.jsonl"))
    curves = loss_curves(recipe, {"one": ParallelDims(), "two": ParallelDims(data_shard=2)}, tmp_path / "runs", steps=3)
    assert len(curves["one"]) == 3
    assert largest_difference(curves["two"], curves["one"]) < 1e-5
