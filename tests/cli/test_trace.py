"""`unmask trace`: the picture is drawn from what was decided."""

from __future__ import annotations

from pathlib import Path

import pytest

import unmask
from unmask.cli.trace import token_marks


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
    first = generation.prompt_tokens
    marks = token_marks(generation.trace, [step.accepted for step in generation.trace], first, len(generation.ids))
    assert sorted(column for column, _ in marks) == list(range(len(generation.ids)))
    assert token_marks(generation.trace, [step.edited for step in generation.trace], first, len(generation.ids)) == []
