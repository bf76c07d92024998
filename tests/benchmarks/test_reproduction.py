"""The reproduction's report: one checkpoint in three modes by turns, and the tables of what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import report
import seeds
import turns
from turns import Answer

from helpers import make_tokenizer
from tiny import tiny_model
from unmask.engine.sampling_params import SamplingParams
from unmask.eval.compare import Comparison, Interval
from unmask.eval.runner import EvalSample
from unmask.models.weights.checkpoint import save_model


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "shifted"
    tokenizer = make_tokenizer(folder, mask_token="<file_sep>")
    special: dict[str, Any] = {"mask_id": tokenizer.mask_id, "block_size": 4, "eos_ids": (tokenizer.eos_id,), "start_id": 0}
    save_model(tiny_model("llama", vocab_size=tokenizer.vocab_size, max_positions=2048, tied_head=True, **special), folder)
    return str(folder)


def test_every_way_answers_every_question(shifted: str) -> None:
    ways = {"plain": SamplingParams(mode="ar", prompt_lookup=False), "ar": SamplingParams(mode="ar")}
    taken = turns.by_turns(shifted, {way: decoding.replace(max_new_tokens=6) for way, decoding in ways.items()}, 1)
    assert [len(answers) for answers in taken.values()] == [5, 5]
    assert [each.tokens for each in taken["plain"]] == [each.tokens for each in taken["ar"]], "greedy text is the same"
    assert all(each.forwards >= each.tokens for each in taken["plain"])


def test_speeds_are_medians_of_the_questions_ratios() -> None:
    plain = [Answer(10, 10, 1.0), Answer(10, 10, 2.0), Answer(10, 10, 1.0)]
    fast = [Answer(10, 5, 0.5), Answer(10, 2, 0.5), Answer(10, 5, 1.0)]
    found = report.speeds({"plain": plain, "fast": fast})
    assert found["fast"] == {
        "tokens_per_second": 15.0,
        "tokens_per_forward": 2.5,
        "median": 2.0,
        "p10": 1.0,
        "p90": 4.0,
        "items": 3,
    }
    assert found["plain"]["median"] == 1.0


def test_the_report_says_scores_shares_and_speeds(tmp_path: Path) -> None:
    def compared(a: float, b: float) -> dict[str, Any]:
        one = Interval(b - a, b - a - 0.02, b - a + 0.02)
        return asdict(Comparison(20, a, b, one, 1, 1, 1.0, one, one))

    tasks = ("mini-5/math", "all")
    scores = {"ar": 0.8, "speculative": 0.8, "diffusion": 0.6}
    row = {"prompts": 10.0, "median_ratio": 1.5, "tokens_per_forward": 1.9, "identical": 1.0}
    rows = {"lookup all": row, "ngrams all": row, "speculative all": row, "speculative talk": {**row, "median_ratio": 1.1}}
    way = {"tokens_per_second": 99.0, "tokens_per_forward": 2.5, "median": 1.7, "p10": 1.2, "p90": 2.5, "items": 50}
    found = {
        "date": "2026-11-30",
        "environment": {"cpu": "one", "cores": 2},
        **{"drafting": "drafting", "child": "child", "block_size": 8, "threshold": 0.9},
        "everyday": {"everyday": rows},
        "llamacpp": {"D1 ours, default model, everyday": 2.0, "D1 ours, default model": 2.5},
        "against_control": {mode: {task: compared(0.8, score) for task in tasks} for mode, score in scores.items()},
        "speeds": dict.fromkeys(("plain", *scores), way),
    }
    lines = report.describe(found)
    assert "| everyday | 10 | **1.50x** (1.10 to 1.10 by kind) | 1.50x | 1.90 | 100% |" in lines
    assert any("llama.cpp" in line and line.endswith("together: default model 2.50x.") for line in lines)
    assert not any("llama.cpp" in line for line in report.describe({**found, "llamacpp": {}}))
    assert "| diffusion | 60.0 | **0.750** | -20.0 (-22.0 to -18.0) | 2.50 | 1.70 (1.20 to 2.50) |" in lines
    assert "| math | 80.0 | 80.0 | 80.0 | 60.0 |" in lines
    report.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def write_run(folder: Path, scores: list[float]) -> Path:
    """A run of one task of so many items."""
    folder.mkdir(parents=True)
    samples = [
        EvalSample("mini-5/math", str(number), "?", "1", "1", "1", score, None, "stop", 5, 10, 4, 0.1)
        for number, score in enumerate(scores)
    ]
    speed = {"tokens": 10 * len(scores), "forwards": 4 * len(scores), "seconds": 1.0}
    tasks = {"mini-5/math": {"score": sum(scores) / len(scores), "speed": speed}}
    (folder / "results.json").write_text(json.dumps({"tasks": tasks}))
    (folder / "samples.jsonl").write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))
    return folder


def test_seeds_are_compared_in_pairs_of_their_own_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed's child has two more questions right, the other's one less: a sixth more in all."""
    by_variant = {
        ("control", "ar"): ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]),
        ("joint", "diffusion"): ([1.0, 1.0, 1.0], [1.0, 0.0, 0.0]),
        ("aligned", "diffusion"): ([0.0, 0.0, 0.0],),
    }
    folders = {
        key: {seed: write_run(tmp_path / f"{key[0]}-{seed}", scores) for seed, scores in enumerate(runs)}
        for key, runs in by_variant.items()
    }
    monkeypatch.setattr(seeds, "load_results", lambda folder: json.loads((folder / "results.json").read_text()))
    monkeypatch.setattr(
        seeds,
        "load_samples",
        lambda folder: [EvalSample(**json.loads(line)) for line in (folder / "samples.jsonl").read_text().splitlines()],
    )
    control, joint, aligned = seeds.rows(folders)
    assert "against_control" not in control
    assert joint["against_control"]["value"] == pytest.approx(1 / 6)
    assert joint["tokens_per_forward"] == pytest.approx(2.5)
    assert aligned["against_control"]["value"] == pytest.approx(-1 / 3), "against the one control of its seed"
    table = "\n".join(seeds.table([control, joint, aligned], 1000))
    assert "| joint | diffusion | 100.0, 33.3 | 66.7 | +16.7" in table
    assert "| control | ar | 33.3, 66.7 | 50.0 |  |" in table
