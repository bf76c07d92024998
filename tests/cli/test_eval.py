"""`unmask eval`, `compare` and `sweep` on tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TWO = "mini-5/math,mini-5/agent"
FEW = ("--limit", 2, "--quantize", "none")


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion model whose context holds these questions in the test tokenizer's short tokens."""
    from helpers import make_tokenizer
    from tiny import tiny_model
    from unmask.models.weights.checkpoint import save_model

    folder = tmp_path_factory.mktemp("models") / "wide"
    tokenizer = make_tokenizer(folder, mask_token="<file_sep>")
    special = {"mask_id": tokenizer.mask_id, "block_size": 8, "eos_ids": (tokenizer.eos_id,)}
    save_model(tiny_model("llama", vocab_size=tokenizer.vocab_size, max_positions=2048, tied_head=True, **special), folder)
    return folder


def test_a_run_says_scores_and_speeds_and_goes_on(run, fails, wide_folder: Path, tmp_path: Path) -> None:
    asked = ("eval", "--model", wide_folder, "--tasks", TWO, "--out", tmp_path / "run", *FEW)
    result = run(*asked)
    assert result.exit_code == 0, result.output
    for words in ("mini-5/math", "mini-5/agent", "exact match", "tokens per", "mean", str(tmp_path / "run")):
        assert words in result.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: task["items"] for name, task in results["tasks"].items()} == {"mini-5/math": 2, "mini-5/agent": 2}
    assert all(task["speed"]["forwards"] > 0 for task in results["tasks"].values())
    assert "--resume" in fails(*asked)
    again = run(*asked, "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["tasks"] == results["tasks"]


def test_tasks_of_lm_eval_are_run_and_resumed(
    run, fails, wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    from unmask.eval import harness

    # Reading all of lm-eval's own tasks takes ten seconds.
    monkeypatch.setattr(harness, "TaskManager", lambda **options: TaskManager(include_defaults=False, **options))
    (tmp_path / "docs.jsonl").write_text('{"question": "1 + 2?", "choices": ["2", "3"], "gold": 1}\n')
    task = {
        **{"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}},
        **{"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "gold", "doc_to_choice": "{{choices}}"},
        **{"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    asked = ("eval", "--model", wide_folder, "--tasks", tmp_path / "mine.yaml", "--out", tmp_path / "run", *FEW)
    result = run(*asked, "--threshold", 0.5, "--samples", 2)
    assert result.exit_code == 0, result.output
    assert "acc" in result.stdout
    found = json.loads((tmp_path / "run" / "harness.json").read_text())
    assert found["options"]["decoding"] == {"threshold": 0.5}
    assert "--resume" in fails(*asked)
    assert "threshold" in fails(*asked, "--samples", 2, "--resume")


def test_ctrl_c_says_how_a_run_goes_on(run, wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.eval.suite.EvalRun.tasks", interrupted)
    result = run("eval", "--model", wide_folder, "--tasks", TWO, "--out", tmp_path / "run", *FEW)
    assert result.exit_code == 130
    assert "--resume" in result.stderr


def test_a_task_that_is_named_twice_is_asked_once(run) -> None:
    result = run("eval", "--suite", "mini-5", "--tasks", "mini-5/math,mini-5/math,arc_easy,arc_easy", "--dry-run")
    lines = result.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 6


def test_questions_that_do_not_fit_are_told(run, diffusion_folder: Path, tmp_path: Path) -> None:
    result = run("eval", "--model", diffusion_folder, "--tasks", "mini-5/agent", "--out", tmp_path / "run", *FEW)
    assert "2 of mini-5/agent" in " ".join(result.stdout.split())


def test_numbers_are_checked_where_they_are_given(run, fails, wide_folder: Path, tmp_path: Path) -> None:
    asked = ("eval", "--model", wide_folder, "--tasks", TWO, "--out", tmp_path / "run", *FEW)
    for option, value in (("--samples", 1), ("--batch", 0)):
        result = run(*asked, option, value)
        assert (result.exit_code, option in result.stderr) == (2, True)
    assert "--needle is -5" in fails(*asked, "--needle=-5")
    assert "70 tokens do not fit" in fails(*asked, "--needle", 70)


def test_what_there_is_is_listed(run) -> None:
    result = run("eval", "--list")
    for words in ("mini-5", "llada2-47", "mini-5/coding", "humaneval-offline", "MIT"):
        assert words in result.stdout


def test_dry_runs_name_what_would_run(run) -> None:
    result = run("eval", "--tasks", "mini-5/math,arc_challenge", "--dry-run")
    assert result.stdout.splitlines() == ["mini-5/math: 50 items", "arc_challenge: lm-eval"]
    plan = json.loads(run("eval", "--suite", "llada2-47", "--dry-run", "--json").stdout)
    assert plan["total"] == plan["run"] + plan["not_run"] == len(plan["benchmarks"]) == 47
    assert sum(each["reason"] is None for each in plan["benchmarks"]) == plan["run"]
    assert re.search(r"\d+ of 47", " ".join(run("eval", "--suite", "llada2-47", "--dry-run").stdout.split()))


def test_the_47_offline_are_filled_in_where_they_can(
    run, wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))  # no environments of other harnesses
    asked = ("eval", "--model", wide_folder, "--suite", "llada2-47", "--limit", 1, "--out", tmp_path, "--quantize", "none")
    result = run(*asked)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "suite.json").read_text())
    scores = {each["benchmark"]: each["score"] for each in results["benchmarks"]}
    assert len(scores) == 47
    ran = {name for name, score in scores.items() if score is not None}
    assert ran == {"HumanEval", "IFEval-strict-prompt"}, "all others need a download or another harness"
    assert all(each["reason"] for each in results["benchmarks"] if each["score"] is None), "no silent zero"
    assert results["mean"]["run"] == 2
    assert "LLaDA2.0-mini" in result.stdout
    assert "over the 2 of 47" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "--tasks"),
        (("--suite", "no-such-suite"), "'no-such-suite'"),
        (("--tasks", "mini-5/math", "--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_what_cannot_be_run(fails, options: tuple[object, ...], name: str, tmp_path: Path) -> None:
    fails("eval", *options, "--out", tmp_path / "run", names=[name])


@pytest.mark.parametrize(("option", "value"), [("--limit", 0), ("--split", "dev")])
def test_an_option_out_of_range_is_named(run, option: str, value: object) -> None:
    told = run("eval", "--tasks", "mini-5/math", option, value)
    assert told.exit_code == 2
    assert f"Invalid value for '{option}'" in told.stderr


@pytest.mark.parametrize("verb", ["eval", "sweep"])
def test_without_options_the_missing_one_is_named(fails, verb: str) -> None:
    assert "--suite" in fails(verb)


def test_compare_and_sweep(run, fails, wide_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = run("compare", wide_folder, wide_folder, "--tasks", TWO, "--out", out, *FEW)
    assert result.exit_code == 0, result.output
    report = (out / "report.md").read_text()
    assert "| mini-5/math | 2 |" in report
    assert "| all | 4 |" in report
    assert (out / "comparison.png").stat().st_size > 5000
    assert "data:image/png;base64," in (out / "report.html").read_text()
    found = json.loads((out / "comparison.json").read_text())
    assert found["tasks"]["all"]["difference"]["value"] == 0.0
    again = run("compare", out / "a", out / "b", "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "again" / "comparison.json").read_text())["tasks"] == found["tasks"]
    assert "not paired" in fails("compare", wide_folder, wide_folder, "--tasks", "arc_challenge")
    fails("compare", wide_folder, "nosuch", "--tasks", TWO, "--out", tmp_path / "none", *FEW, names=["'nosuch'"])
    assert not (tmp_path / "none").exists()
    asked = ("--tasks", "mini-5/math", "--thresholds", "0.3,0.9", "--block-sizes", "4,8", *FEW)
    result = run("sweep", "--model", wide_folder, *asked, "--out", tmp_path / "sweep")
    assert result.exit_code == 0, result.output
    points = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]
    assert [(p["block_size"], p["threshold"]) for p in points] == [(4, 0.3), (4, 0.9), (8, 0.3), (8, 0.9)]
    assert (tmp_path / "sweep" / "frontier.png").stat().st_size > 5000
    late = ("--thresholds", "0.5,1.5", "--out", tmp_path / "none")
    fails("sweep", "--model", wide_folder, "--tasks", "mini-5/math", *late, names=["--threshold", 1.5])
    assert not (tmp_path / "none").exists()
    assert "numbers" in fails("sweep", "--model", wide_folder, "--tasks", "mini-5/math", "--thresholds", "high")


def test_needles_in_a_stretched_context(run, fails, wide_folder: Path, tmp_path: Path) -> None:
    asked = ("eval", "--model", wide_folder, "--limit", 1, "--quantize", "none")
    assert "--yarn" in fails(*asked, "--needle", "3000", "--out", tmp_path / "no")
    fails(*asked, "--needle", "100", "--expert-capacity", 4, "--out", tmp_path / "dense", names=["expert_capacity", 4])
    assert "separated by commas" in fails(*asked, "--needle", "long", "--out", tmp_path / "no")
    assert "more than 1" in fails(*asked, "--needle", "1500", "--yarn", "0.5", "--out", tmp_path / "no")
    result = run(*asked, "--needle", "1500,2500", "--yarn", "2", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    kinds = ("single", "multi_key", "multi_value", "tracking")
    assert set(results["tasks"]) == {f"needle/{kind}/{length}" for kind in kinds for length in (1500, 2500)}
    assert "YaRN 2" in results["model"]["name"]
