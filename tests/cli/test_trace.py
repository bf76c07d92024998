"""`unmask trace`: the picture is drawn from what was decided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import unmask
from unmask.cli.trace import by_step


@pytest.mark.filterwarnings("ignore:the model was not trained to edit")
@pytest.mark.parametrize("options", [(), ("--edit-threshold", 0.3), ("--policy", "entropy"), ("--block-size", 4)])
def test_a_picture_is_written(run, diffusion_folder: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    out = tmp_path / "new" / "order.png"
    result = run("trace", "Hello", "-m", diffusion_folder, "--max-new-tokens", 20, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "tokens per forward" in result.stdout


def test_every_token_of_the_answer_is_marked_once(diffusion_folder: Path) -> None:
    model = unmask.load(diffusion_folder, dtype="float32")
    generation = model.generate("Hello there", max_new_tokens=20, trace=True, threshold=0.3)
    accepted = by_step(generation, lambda step: step.accepted)
    assert accepted.shape == (len(generation.trace), len(generation.ids))
    assert (np.nansum(accepted, axis=0) == 1).all()
    assert np.nansum(by_step(generation, lambda step: step.edited)) == 0
