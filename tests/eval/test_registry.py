"""Suites: the report's numbers, lm-eval's task names, files with mistakes, and means that compare like with like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from unmask.errors import ConfigError
from unmask.eval.registry import Benchmark, Suite, load_suite, mean_scores
from unmask.eval.suite import own_tasks
from unmask.eval.task import Dimension

# The folders of lm-eval's tasks that the suite names: indexing only these takes a second, all of them ten.
LM_EVAL_FOLDERS = ["mmlu", "mmlu_pro", "cmmlu", "ceval", "arc", "gpqa", "triviaqa", "bbh", "leaderboard", "piqa", "hellaswag"]
LM_EVAL_FOLDERS += ["drop", "squadv2", "cruxeval", "mbpp", "humaneval", "gsm8k", "benchmarks", "minerva_math", "aime"]
LM_EVAL_FOLDERS += ["gsm_plus", "ifeval"]


@pytest.fixture(scope="session")
def suite() -> Suite:
    return load_suite("llada2-47")


@pytest.fixture(scope="session")
def lm_eval_tasks() -> Any:
    tasks = pytest.importorskip("lm_eval.tasks")
    root = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in LM_EVAL_FOLDERS])


def small_suite(**changes: Any) -> dict[str, Any]:
    entry = {"metric": "accuracy", "shots": 0, "size": 4, "source": "hf:a/b"}
    benchmarks = [
        {"name": "A", "dimension": "math", "tasks": ["a1", "a2"], "differs": "two of them", "published": [10.0, 0.0]},
        {"name": "B", "dimension": "math", "elsewhere": "other b", "published": [20.0, 1.0]},
        {"name": "C", "dimension": "agent", "missing": "the questions", "published": [60.0, 2.0]},
    ]
    return {"name": "small", "models": ["m", "n"], "benchmarks": [{**entry, **each} for each in benchmarks], **changes}


SMALL = Suite.model_validate(small_suite())


def lm_eval_leaves(manager: Any, name: str) -> list[dict[str, Any]]:
    """Configurations of the tasks below a task, tag or group."""
    entry = manager.task_index[name]
    if entry.kind.name == "GROUP":
        children = [inner for child in entry.cfg["task"] for inner in (child["task"] if isinstance(child, dict) else [child])]
    elif entry.kind.name == "TAG":
        children = sorted(entry.tags)
    else:
        return [entry.cfg]
    return [leaf for child in children for leaf in lm_eval_leaves(manager, child)]


def published(suite: Suite, model: str) -> dict[str, float]:
    return {each.name: each.published[suite.models.index(model)] for each in suite.benchmarks}


class TestTheReport:
    @pytest.mark.parametrize(
        ("model", "mean"),
        [
            ("LLaDA2.0-mini", 64.34),
            ("LLaDA2.0-flash", 73.18),
            ("Qwen3-8B (no thinking)", 63.42),
            ("Ling-mini-2.0", 65.77),
            ("Qwen3-30B-A3B-Instruct-2507", 73.60),
            ("Ling-flash-2.0", 72.15),
        ],
    )
    def test_the_scores_have_the_means_that_the_report_prints(self, suite: Suite, model: str, mean: float) -> None:
        assert len(suite.benchmarks) == 47
        assert mean_scores(published(suite, model), suite).mean == pytest.approx(mean, abs=0.005)

    def test_the_mean_of_a_dimension_is_over_its_benchmarks(self, suite: Suite) -> None:
        scores = published(suite, "LLaDA2.0-flash")
        means = {dimension: mean_scores(scores, suite, dimension) for dimension in get_args(Dimension)}
        assert sum(mean.total for mean in means.values()) == len(suite.benchmarks)
        # IFEval, BFCL, CodeIF-Bench and Nexus FC as printed
        assert means["agent"].mean == pytest.approx((81.70 + 75.43 + 58.00 + 50.45) / 4)

    def test_a_size_gives_the_published_decimals(self, suite: Suite) -> None:
        """A share of `size` questions, rounded or cut to two decimals; more than a few thousand give any decimals."""
        checked = 0
        for benchmark in suite.benchmarks:
            if benchmark.size is None or benchmark.size > 3000:
                continue
            shares = [100 * count / benchmark.size for count in range(benchmark.size + 1)]
            fits = [any(-0.0051 <= share - score < 0.01 for share in shares) for score in benchmark.published[:4]]
            assert sum(fits) >= 3, benchmark.name
            checked += 1
        assert checked > 15


class TestTasks:
    def test_own_tasks_are_those_that_need_no_download(self, suite: Suite) -> None:
        own = [each.name for each in suite.benchmarks if each.tasks and set(each.tasks) <= own_tasks().keys()]
        assert own == ["HumanEval", "IFEval-strict-prompt", "BFCL v3"]

    def test_every_task_of_lm_eval_exists_and_is_what_the_suite_says(self, suite: Suite, lm_eval_tasks: Any) -> None:
        seen = set()
        for benchmark in suite.benchmarks:
            for name in (name for name in benchmark.tasks if name not in own_tasks()):
                assert name in lm_eval_tasks.task_index, f"{benchmark.name}: {name}"
                leaves = lm_eval_leaves(lm_eval_tasks, name)
                seen.update(leaf["task"] for leaf in leaves)
                for leaf in (leaf for leaf in leaves if "class" not in leaf):  # of one in Python the YAML says only where
                    self.check(benchmark, name, leaf)
        assert len(seen) > 200  # groups were opened down to their tasks
        assert {"mmlu_abstract_algebra_generative", "minerva_math_algebra", "squadv2"} <= seen

    @staticmethod
    def check(benchmark: Benchmark, name: str, leaf: dict[str, Any]) -> None:
        assert f"hf:{leaf['dataset_path']}" == benchmark.source, name
        assert leaf.get("unsafe_code", False) == benchmark.runs_code, name
        by_likelihood = leaf["output_type"] == "multiple_choice"
        assert by_likelihood == ("likelihood" in (benchmark.differs or "")), name
        assert (leaf.get("num_fewshot") or 0) == benchmark.shots, name


class TestLoading:
    def test_a_suite_from_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small_suite()), encoding="utf-8")
        assert load_suite(tmp_path / "mine.yaml") == SMALL

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"heading": "x"}, "heading"),
            ({"models": ["m"]}, "published"),
            ({"benchmarks": small_suite()["benchmarks"] * 2}, "twice"),
            ({"benchmarks": [{**small_suite()["benchmarks"][0], "missing": "something"}]}, "missing"),
            ({"benchmarks": [{**small_suite()["benchmarks"][2], "missing": None}]}, "missing"),
            ({"benchmarks": [{**small_suite()["benchmarks"][0], "dimension": "art"}]}, "dimension"),
        ],
    )
    def test_a_broken_suite_is_refused_in_one_line(self, tmp_path: Path, change: dict[str, Any], field: str) -> None:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small_suite(**change)), encoding="utf-8")
        with refused(ConfigError, field):
            load_suite(tmp_path / "mine.yaml")

    def test_no_yaml_and_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("a: [b", encoding="utf-8")
        with refused(ConfigError, "YAML"):
            load_suite(tmp_path / "mine.yaml")
        with refused(ConfigError, "llada2-47"):
            load_suite("llada2")


class TestMeans:
    def test_only_the_same_benchmarks_are_compared(self) -> None:
        whole = mean_scores({"A": 50.0, "C": 0.0}, SMALL)
        assert (whole.run, whole.total, whole.mean, whole.published) == (2, 3, 25.0, {"m": 35.0, "n": 1.0})
        math = mean_scores({"A": 50.0, "C": 0.0}, SMALL, "math")
        assert (math.run, math.total, math.mean, math.published) == (1, 2, 50.0, {"m": 10.0, "n": 0.0})
        agent = mean_scores({"A": 50.0, "C": 0.0}, SMALL, "agent")
        assert (agent.run, agent.mean) == (1, 0.0)

    def test_nothing_run_is_no_zero(self) -> None:
        mean = mean_scores({}, SMALL)
        assert (mean.run, mean.mean, mean.published) == (0, None, {})

    @given(indices=st.sets(st.integers(0, 46)))
    def test_published_scores_as_results_come_out_as_published(self, suite: Suite, indices: set[int]) -> None:
        scores = published(suite, "LLaDA2.0-flash")
        scores = {suite.benchmarks[index].name: scores[suite.benchmarks[index].name] for index in indices}
        dimensions: Sequence[Dimension] = get_args(Dimension)
        parts = [mean_scores(scores, suite, dimension) for dimension in dimensions]
        for part in (whole := mean_scores(scores, suite), *parts):
            assert (part.mean is None) == (part.run == 0)
            assert part.published.get("LLaDA2.0-flash") == (pytest.approx(part.mean) if part.run else None)
        assert whole.run == sum(part.run for part in parts) == len(indices)

    @pytest.mark.parametrize("score", [-1.0, 100.5, float("nan")])
    def test_a_score_that_is_no_percentage_is_refused(self, score: float) -> None:
        with refused(ConfigError, "'A'"):
            mean_scores({"A": score}, SMALL)

    def test_an_unknown_name_is_refused(self) -> None:
        with refused(ConfigError, "'Z'"):
            mean_scores({"Z": 1.0}, SMALL)
