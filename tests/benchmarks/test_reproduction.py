"""The reproduction's report: one checkpoint in three modes by turns, and the tables of what was measured."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import report
import turns
from turns import Answer

from helpers import make_tokenizer
from tiny import tiny_model
from unmask.engine.sampling_params import SamplingParams
from unmask.eval.compare import Comparison, Interval
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
        "against_control": {mode: {task: compared(0.8, score) for task in tasks} for mode, score in scores.items()},
        "speeds": dict.fromkeys(("plain", *scores), way),
    }
    lines = report.describe(found)
    assert "| everyday | 10 | **1.50x** (1.10 to 1.10 by kind) | 1.50x | 1.90 | 100% |" in lines
    assert "| diffusion | 60.0 | **0.750** | -20.0 (-22.0 to -18.0) | 2.50 | 1.70 (1.20 to 2.50) |" in lines
    assert "| math | 80.0 | 80.0 | 80.0 | 60.0 |" in lines
    report.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
