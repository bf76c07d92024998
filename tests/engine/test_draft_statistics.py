"""What is learnt for drafting outlasts an engine and a process, and a damaged file costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny import MASK, tiny_model
from unmask.engine.acceptance import DraftEstimates
from unmask.engine.costs import MeasuredCosts
from unmask.engine.draft_statistics import DraftStatistics, statistics_folder, statistics_path
from unmask.engine.llm import LanguageModel

KERNELS = "avx2-8bit"


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As users have it."""
    monkeypatch.setattr("unmask.engine.draft_statistics.MeasuredCosts", MeasuredCosts)
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNMASK_DRAFT_STATISTICS")


def learnt(path: Path) -> DraftStatistics:
    statistics = DraftStatistics(KERNELS, path)
    for _ in range(50):
        statistics.costs.observe((1, 0, 0), 0.010)
        statistics.costs.observe((4, 2, 0), 0.017)
    estimates = DraftEstimates(statistics.history)
    drafts = [estimates.draft(7, ("masks", 9, 1), 0.9), estimates.draft(8, ("lookup", 2, 0), 0.5)]
    for _ in range(20):
        estimates.record(*drafts[0][2:], True)
        estimates.record(*drafts[1][2:], False)
        estimates.record_masks(drafts[:1], 2, drafts[1:])
    statistics.history.record_request(True)
    return statistics


def shown(statistics: DraftStatistics) -> object:
    history = statistics.history
    outcomes = [[[round(p, 3) for p in chain] for chain in outcome] for outcome in history.outcomes.kept]
    return history.counts, history.paying, outcomes[-20:]


def test_another_process_starts_from_what_was_learnt(tmp_path: Path) -> None:
    path = tmp_path / "drafting" / "model.json"
    first = learnt(path)
    first.keep()
    second = DraftStatistics(KERNELS, path)
    assert second.costs.cost(4, 2, 0) == pytest.approx(first.costs.cost(4, 2, 0)) == pytest.approx(1.7, rel=0.1)
    assert shown(second) == shown(first)
    assert [each.name for each in path.parent.iterdir()] == ["model.json"], "nothing else is left"


def test_it_is_not_written_all_the_time(tmp_path: Path) -> None:
    statistics = DraftStatistics(KERNELS, tmp_path / "model.json")
    statistics.keep()
    (tmp_path / "model.json").unlink()
    statistics.keep()
    assert list(tmp_path.iterdir()) == []
    DraftStatistics(KERNELS).keep()


def damaged(content: str) -> list[str]:
    value = json.loads(content)
    wrong = [
        {**value, "costs": {**value["costs"], "parameters": [1.0]}},
        {**value, "acceptance": {**value["acceptance"], "counts": [["guess", 1, 0, 1.0, 2.0]]}},
        {**value, "acceptance": {**value["acceptance"], "counts": [["masks", 1, 0, 3.0, 2.0]]}},
        {**value, "acceptance": {**value["acceptance"], "outcomes": [[[0.5], []]]}},
        {**value, "acceptance": {**value["acceptance"], "outcomes": [[[2.0] * 32, []]]}},
        {**value, "acceptance": {**value["acceptance"], "outcomes": [[[0.5] * 32, [0.5] * 33]]}},
        {**value, "acceptance": {**value["acceptance"], "outcomes": [[0.5] * 32]}},
        {**value, "acceptance": {**value["acceptance"], "paying": 3}},
        {"costs": value["costs"]},
    ]
    return ["", content[:-40], "[1]", "null", *map(json.dumps, wrong)]


def test_a_damaged_file_is_left_out_and_written_again(tmp_path: Path) -> None:
    path, fresh = tmp_path / "model.json", DraftStatistics(KERNELS)
    learnt(path).keep()
    for content in damaged(path.read_text()):
        path.write_text(content)
        statistics = DraftStatistics(KERNELS, path)
        assert shown(statistics) == shown(fresh), content[:200]
        statistics.keep()
        assert json.loads(path.read_text())["costs"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    DraftStatistics(KERNELS, tmp_path / "file" / "model.json").keep()


def test_a_file_belongs_to_a_model_its_kernels_and_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [("one", KERNELS, 2), ("two", KERNELS, 2), ("one", "torch-cpu-float32", 2), ("one", KERNELS, 1)]
    paths = [statistics_path(tmp_path / name, kernels, threads) for name, kernels, threads in variants]
    assert len(set(paths)) == 4
    assert all(path is not None and path.parent == statistics_folder() == tmp_path / "cache" / "drafting" for path in paths)
    assert statistics_path(None, KERNELS, 2) is None
    monkeypatch.setenv("UNMASK_DRAFT_STATISTICS", "0")
    assert statistics_path(tmp_path, KERNELS, 2) is None


def test_engines_of_a_model_share_what_is_learnt_and_a_loaded_one_keeps_it(tmp_path: Path) -> None:
    options = {"prompt_lookup": True, "eos_id": (), "max_new_tokens": 12}
    loaded = LanguageModel(tiny_model("llama"), None, name="tiny", folder=tmp_path / "tiny")
    loaded.generate_ids([5, 6, 5, 6, 5, 6], **options)
    assert loaded.engine()._drafting is loaded.engine()._drafting
    (path,) = statistics_folder().iterdir()
    assert path.name.startswith("tiny-")
    again = LanguageModel(tiny_model("llama"), None, name="tiny", folder=tmp_path / "tiny")
    assert again.drafting.history.counts == loaded.drafting.history.counts != {}
    LanguageModel(tiny_model("llama"), None, name="tiny").generate_ids([MASK - 1], **options)
    assert list(statistics_folder().iterdir()) == [path], "a model without a folder keeps nothing"
