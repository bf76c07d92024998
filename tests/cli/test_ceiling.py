"""`unmask ceiling` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs import tiny_folder


@pytest.mark.parametrize("kind", ["autoregressive", "shifted"])
def test_figures_of_a_model(run, kind: str, tmp_path: Path) -> None:
    special = {"mask_id": 3, "start_id": 1, "block_size": 4} if kind == "shifted" else {}
    folder, prompts = tiny_folder(tmp_path / "model", **special), tmp_path / "prompts.txt"
    prompts.write_text("say 1\nsay 2\nsay 3\n")
    command = ["ceiling", prompts, "--model", folder, "--limit", 2, "--max-new-tokens", 6, "--quantize", "none"]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["all"]["prompts"] == 2
    assert figures["block_size"] == (4 if kind == "shifted" else 8)
    assert figures["all"]["ceiling"] >= 1
    assert (figures["all"]["drafts"] is None) == (kind == "autoregressive")
    assert bool(figures["distances"]) == (kind == "shifted")
    lines = run(*command).stdout
    assert "tokens per forward" in lines
    assert ("distance" in lines) == (kind == "shifted")
