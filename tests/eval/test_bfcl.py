"""BFCL: right answers count in every category, wrong ones do not, hostile ones do no harm; a stub stands in for bfcl-eval."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedModel

from helpers import refused
from unmask.errors import BackendError, ConfigError
from unmask.eval import bfcl
from unmask.eval.bfcl import GROUPS, bfcl_tasks, interpreter
from unmask.eval.bfcl_checker import arithmetic
from unmask.eval.runner import load_samples, run_tasks
from unmask.eval.task import Item, ItemScore, Split, Task

TASKS = {task.name.removeprefix("bfcl-offline/"): task for task in bfcl_tasks()}
SIZES = {"simple_python": 3, "multiple": 1, "live_relevance": 2}
"""Questions of the stub's categories; 2 where it is not said."""
BROKEN = {"live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3", "live_multiple_964-207-0"}
"""Nobody can be right: a required argument has no possible value, or is missing, or one is there that the function lacks."""
CHECKER = f"""
import json, os, sys
for line in sys.stdin:
    told = json.loads(line)
    if sys.argv[1] == "prompts":
        for number in range({SIZES!r}.get(told, 2)):
            turns = [{{"role": "user", "content": f"question {{number}}"}}]
            if told == "live_irrelevance":
                turns.append({{"role": "user", "content": "more"}} if number else {{"role": "assistant", "content": "Yes?"}})
            messages = [{{"role": "system", "content": f"functions of {{told}}"}}, *turns]
            print(json.dumps({{"id": f"{{told}}_{{number}}", "category": told, "messages": messages}}))
    elif told["answer"] == "crash":
        sys.exit("Traceback\\nValueError: no such question")
    elif told["answer"] == "babble":
        print("no JSON")
    else:
        assert os.path.isdir(os.environ["BFCL_PROJECT_ROOT"])
        right = told["answer"] == f"call of {{told['category']}}"
        print(json.dumps({{"value": float(right), "calls": told["answer"], "problem": None if right else "wrong \\u2028"}}))
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib/python3.11/site-packages" / f"bfcl_eval-{bfcl.RELEASE}.dist-info").mkdir(parents=True)
    (venv / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "bin/python").chmod(0o755)
    (tmp_path / "checker.py").write_text(CHECKER)
    monkeypatch.setattr(bfcl, "VENV", venv)
    monkeypatch.setattr(bfcl, "CHECKER", tmp_path / "checker.py")
    return venv


def ids(task: Task, count: int) -> list[str]:
    return [item.id for item in task.items("test", count)]


def test_categories_take_turns(stub: Path) -> None:
    first = ["simple_python_0", "simple_java_0", "simple_javascript_0", "multiple_0", "parallel_0", "parallel_multiple_0"]
    second = ["simple_python_1", "simple_java_1", "simple_javascript_1", "parallel_1", "parallel_multiple_1"]
    everything = [*first, *second, "simple_python_2"]
    assert ids(TASKS["non_live_ast"], 100) == everything
    assert all(ids(TASKS["non_live_ast"], count) == everything[:count] for count in range(12))
    assert ids(TASKS["live_relevance"], 1) == ["live_relevance_0"]


def test_items_hold_what_is_needed(stub: Path) -> None:
    item = TASKS["non_live_ast"].items("test", 2)[1]
    assert (item.system, item.prompt) == ("functions of simple_java", "question 0")
    assert item.target == {"id": "simple_java_0", "category": "simple_java"}
    assert not item.raw
    prompts = [item.prompt for item in TASKS["live_irrelevance"].items("test", 2)]
    assert prompts == ["user: question 0\n\nassistant: Yes?", "question 1\n\nmore"]
    with refused(ConfigError, "bfcl-offline/irrelevance", "train", "test"):
        TASKS["irrelevance"].items("train", 1)


def test_verdicts_are_scores(stub: Path) -> None:
    items = TASKS["non_live_ast"].items("test", 3)
    scores = TASKS["non_live_ast"].score(items, ["call of simple_python", "call of simple_python", "\ud800 gärbage\n\u2028"])
    assert scores[0] == ItemScore(1.0, "call of simple_python", None)
    assert [score.value for score in scores] == [1.0, 0.0, 0.0]
    assert (scores[1].detail, scores[2].extracted) == ("wrong \u2028", "\ud800 gärbage\n\u2028")


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("crash", ("exit code 1", "ValueError", "python -m venv")),
        ("babble", ("Expecting value",)),
    ],
)
def test_a_broken_checker_is_an_error(stub: Path, answer: str, names: tuple[str, ...]) -> None:
    items = TASKS["irrelevance"].items("test", 1)
    with refused(BackendError, *names):
        TASKS["irrelevance"].score(items, [answer])


def test_absent_package_is_named(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfcl, "RELEASE", "2026.3.24")
    with refused(ConfigError, "bfcl-eval 2026.3.24"):
        TASKS["irrelevance"].items("test", 1)
    monkeypatch.undo()
    monkeypatch.setattr(bfcl, "VENV", stub / "nowhere")
    for ask in (lambda: TASKS["irrelevance"].items("test", 1), lambda: TASKS["irrelevance"].score([], [])):
        with refused(ConfigError, "python -m venv", "--no-deps bfcl-eval==2026.3.23"):
            ask()


def test_arithmetic_is_all_that_runs(tmp_path: Path) -> None:
    assert [arithmetic(source) for source in ("2 * -3.5", "'a' + 'b'", "[0] * 2 + [1]", "2 ** 3")] == [-7.0, "ab", [0, 0, 1], 8]
    for source in (
        "x + 1",
        f"open({str(tmp_path / 'made')!r}, 'w') + 1",
        "'a'.upper() + 'b'",
        "(lambda: 1)() + 1",
        "1 + [y for y in ()]",
    ):
        with pytest.raises(ValueError, match="is no arithmetic"):
            arithmetic(source)
    assert not (tmp_path / "made").exists()


def test_a_question_beyond_the_context_is_wrong_and_the_run_goes_on(stub: Path, tmp_path: Path) -> None:
    def items(split: Split, count: int) -> list[Item]:
        first, second, *_ = TASKS["irrelevance"].items(split, count)
        return [replace(first, max_new_tokens=2048, system=None), replace(second, system=None)]

    model = ScriptedModel(tmp_path, lambda prompt: "call of irrelevance")
    results = run_tasks(model, [replace(TASKS["irrelevance"], items=items)], tmp_path / "run", count=lambda _: 2)
    summary = results["tasks"]["bfcl-offline/irrelevance"]
    assert (summary["score"], summary["items"], summary["too_long"]) == (0.5, 2, 1)
    samples = {sample.id: sample for sample in load_samples(tmp_path / "run")}
    assert (samples["irrelevance_1"].score, len(model.asked)) == (1.0, 1)
    long = samples["irrelevance_0"]
    assert (long.score, long.finish_reason, long.forwards) == (0.0, "too long", 0)
    assert long.detail == "not asked: 19 tokens and an answer of up to 2048 exceed the context of 2048"


# With bfcl-eval itself


@pytest.fixture(scope="module")
def data() -> Path:
    try:
        python = interpreter()
    except ConfigError as error:
        pytest.skip(str(error))
    return next(python.parents[1].glob("lib/python*/site-packages/bfcl_eval/data"))


def lines(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def chosen(value: Any, deep: bool = False) -> Any:
    """One of the possible answers: a dict lists those of each of its keys."""
    if isinstance(value, dict):
        return {key: next(each for each in options if each != "") for key, options in value.items() if "" not in options}
    return [chosen(each) for each in value] if isinstance(value, list) else value


def java(kind: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value}{ {'float': 'f', 'long': 'L'}.get(kind, '') }"
    return json.dumps(value)


WRITERS: dict[str, Callable[[str, Any], str]] = {"simple_java": java, "simple_javascript": lambda _, value: json.dumps(value)}


def right_answer(category: str, functions: list[dict[str, Any]], truth: list[dict[str, Any]]) -> str | None:
    """In the form that models are asked for; None for Java's and JavaScript's values that are more than numbers and names."""
    calls = []
    for call in truth:
        ((name, possible),) = call.items()
        parameters = next(each for each in functions if each["name"] == name)["parameters"]
        arguments = []
        for argument, options in possible.items():
            if "" in options and argument not in parameters["required"]:
                continue
            empty: Any = [] if parameters["properties"].get(argument, {}).get("type") == "array" else ""
            value = next((each for each in options if each != ""), empty)
            if category in WRITERS:
                if isinstance(value, list | dict) or (isinstance(value, str) and not value.replace(" ", "").isalnum()):
                    return None
                arguments.append(f"{argument}={WRITERS[category](parameters['properties'][argument]['type'], value)}")
            else:
                arguments.append(f"{argument}={chosen(value)!r}")
        calls.append(f"{name}({', '.join(arguments)})")
    return f"[{', '.join(calls)}]"


def right_answers(data: Path, category: str) -> dict[str, str]:
    functions = {entry["id"]: entry["function"] for entry in lines(data / f"BFCL_v4_{category}.json")}
    if category == "live_relevance":
        return {id: f"[{found[0]['name']}()]" for id, found in functions.items()}
    if "irrelevance" in category:
        return dict.fromkeys(functions, "None of these functions can be used.")
    truths = {entry["id"]: entry["ground_truth"] for entry in lines(data / f"possible_answer/BFCL_v4_{category}.json")}
    found = {id: right_answer(category, functions[id], truths[id]) for id in functions}
    return {id: answer for id, answer in found.items() if answer is not None}


def wrong(category: str, answer: str) -> str:
    if "relevance" in category:
        return "[f(a=1)]" if "irrelevance" in category else "I cannot."
    return answer.replace("()", "(extra=1)", 1) if "()" in answer else answer.replace("(", "(extra=1, ", 1)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_right_answers_count_and_wrong_ones_do_not(data: Path, group: str) -> None:
    size, categories = GROUPS[group]
    items = TASKS[group].items("test", size + 1)
    assert len(items) == len({item.id for item in items}) == size == TASKS[group].size
    for category in categories:
        answers = right_answers(data, category)
        own = [item for item in items if item.target["category"] == category and item.id in answers]
        assert len(own) >= 0.3 * sum(item.target["category"] == category for item in items)
        scores = TASKS[group].score(own, [answers[item.id] for item in own])
        failed = {item.id: score.detail for item, score in zip(own, scores, strict=True) if not score.value}
        assert failed.keys() == BROKEN & answers.keys(), failed
        corrupted = TASKS[group].score(own, [wrong(category, answers[item.id]) for item in own])
        assert not any(score.value for score in corrupted)
        assert all(score.detail for score in corrupted)


@pytest.mark.slow
def test_prompts_are_the_official_ones(data: Path) -> None:
    item = TASKS["non_live_ast"].items("test", 2)[1]
    (entry,) = (each for each in lines(data / "BFCL_v4_simple_java.json") if each["id"] == item.id == "simple_java_0")
    assert item.system is not None
    assert item.prompt == entry["question"][0][0]["content"]
    assert item.system.startswith("You are an expert in composing functions.")
    functions = json.loads(item.system[item.system.index("\n[\n") :])
    assert [each["name"] for each in functions] == [each["name"] for each in entry["function"]]
    assert (
        functions[0]["description"]
        == entry["function"][0]["description"] + " Note that the provided function is in Java 8 SDK syntax."
    )


@pytest.mark.slow
def test_hostile_answers_do_no_harm(data: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = [
        f"[f(a=open({str(made)!r}, 'w') + 1)]",
        f"[f(a=[__import__('pathlib').Path({str(made)!r}).touch() or 1] * 2)]",
        "[f(a=9**9**9**9)]",
        "[f(a='a' * 10**11)]",
        "(" * 20000,
        "[" + "-" * 20000 + "1]",
        "\ud800\x00\n\u2028",
        "",
    ]
    started = time.monotonic()
    items = [next(item for item in TASKS["non_live_ast"].items("test", 9) if item.target["category"] == "simple_python")] * len(
        hostile
    )
    scores = TASKS["non_live_ast"].score(items, hostile)
    assert [score.value for score in scores] == [0.0] * len(hostile)
    assert scores[2].detail == "not read within 10 seconds"
    assert not made.exists()
    assert time.monotonic() - started < 60
