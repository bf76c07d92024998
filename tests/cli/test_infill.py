"""`unmask infill`: both sides stay, every hole is filled, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_both_sides_stay_as_they_are(run, diffusion_folder: Path) -> None:
    result = run("infill", "def f(x): ___ return y", "-m", diffusion_folder, "--tokens", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def f(x):")
    assert result.stdout.rstrip("\n").endswith(" return y")


def test_every_hole_is_filled_and_the_likeliest_length_kept(run, diffusion_folder: Path) -> None:
    def fill(tokens: str) -> dict:
        result = run("infill", "one GAP two GAP three", "-m", diffusion_folder, "--hole", "GAP", "--tokens", tokens, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    alone = [fill(str(count)) for count in (1, 2, 3)]
    best = max(alone, key=lambda filling: filling["score"])
    together = fill("1-3")
    assert together["fills"] == best["fills"]
    assert together["tokens_per_hole"] == best["tokens_per_hole"]
    assert together["score"] == pytest.approx(best["score"], abs=1e-4)
    assert together["forwards"] == sum(filling["forwards"] for filling in alone)
    assert len(best["fills"]) == 2


def test_an_adapter_is_applied(run, diffusion_folder: Path, adapter: Path, adapted) -> None:
    given = ("infill", "one ___ three", "-m", diffusion_folder, "--tokens", "6", "--dtype", "float32")
    expected = adapted.infill("one ___ three", tokens=6).text + "\n"
    assert run(*given, "--lora", adapter).stdout == expected != run(*given).stdout


def test_what_it_refuses(fails, ar_folder: Path, diffusion_folder: Path) -> None:
    assert "no hole" in fails("infill", "nothing here", "-m", diffusion_folder)
    assert "--tokens" in fails("infill", "a ___ b", "-m", diffusion_folder, "--tokens", "few")
    assert "at least 1" in fails("infill", "a ___ b", "-m", diffusion_folder, "--tokens", "5-2")
    assert "cannot fill holes" in fails("infill", "a ___ b", "-m", ar_folder)
