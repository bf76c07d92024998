"""BFCL offline: the single-turn questions of the Berkeley Function Calling Leaderboard that need no execution.

Owns the five tasks (the leaderboard's groups), the order of their questions and the access to bfcl-eval, which is installed in
an environment of its own: its prompts and verdicts come from `bfcl_checker.py`, a process there. Imports none of it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import islice, zip_longest
from os import environ
from pathlib import Path
from typing import Any

from unmask.errors import BackendError, ConfigError
from unmask.eval.task import Item, ItemScore, Split, Task

RELEASE = "2026.3.23"
VENV = Path("~/.venvs/bfcl-eval")
CHECKER = Path(__file__).with_name("bfcl_checker.py")
# Without its own requirements, which are several GB: the second list is what the checker imports.
INSTALL = (
    f"python -m venv {VENV} && {VENV}/bin/pip install --no-deps bfcl-eval=={RELEASE} && {VENV}/bin/pip install "
    "filelock tenacity tree-sitter==0.21.3 tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4"
)
_SIMPLE = ("simple_python", "simple_java", "simple_javascript")
GROUPS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "non_live_ast": (1150, (*_SIMPLE, "multiple", "parallel", "parallel_multiple")),
    "irrelevance": (240, ("irrelevance",)),
    "live_ast": (1351, ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")),
    "live_irrelevance": (884, ("live_irrelevance",)),
    "live_relevance": (16, ("live_relevance",)),
}
"""Group -> number of questions, and bfcl-eval's categories."""
MAX_NEW_TOKENS = 512
SECONDS = 900.0
"""Timeout of one checker process; loading takes a second, and an answer at most ten."""


def bfcl_tasks() -> tuple[Task, ...]:
    """The tasks "bfcl-offline/non_live_ast", "irrelevance", "live_ast", "live_irrelevance" and "live_relevance"."""
    return tuple(
        Task(
            name=(name := f"bfcl-offline/{group}"),
            dimension="agent",
            metric="accuracy (AST)" if group.endswith("_ast") else "accuracy",
            version="1",
            licence="Apache-2.0",
            source=f"bfcl-eval {RELEASE} (Patil et al. 2025, Berkeley Function Calling Leaderboard V4)",
            items=partial(_items, name, categories),
            score=_score,
            size=size,
            require=interpreter,
        )
        for group, (size, categories) in GROUPS.items()
    )


def interpreter() -> Path:
    """The Python of bfcl-eval's environment.

    Raises:
        ConfigError: bfcl-eval of this release is not installed.
    """
    venv = VENV.expanduser()
    python = venv / "bin" / "python"
    if not python.is_file() or not any(venv.glob(f"lib/python*/site-packages/bfcl_eval-{RELEASE}.dist-info")):
        raise ConfigError(f"BFCL needs bfcl-eval {RELEASE} in {venv}, where it is not installed; run: {INSTALL}")
    return python


def _ask(python: Path, mode: str, records: Iterable[Any]) -> list[dict[str, Any]]:
    """The checker's replies to records, in its mode `prompts` or `score`.

    Raises:
        BackendError: the checker failed.
    """
    lines = "".join(json.dumps(record) + "\n" for record in records)
    try:
        with tempfile.TemporaryDirectory(prefix="unmask-bfcl-") as folder:  # the package makes folders when it is imported
            process = subprocess.run(
                [str(python), "-I", str(CHECKER), mode],
                input=lines,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=SECONDS,
                check=True,
                cwd=folder,
                env={**environ, "BFCL_PROJECT_ROOT": folder},
            )
        return [json.loads(line) for line in process.stdout.splitlines()]
    except subprocess.CalledProcessError as error:
        reason = f"exit code {error.returncode}: {''.join(error.stderr.strip().splitlines()[-1:])[:300]}"
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        reason = " ".join(str(error).split())[:300]
    raise BackendError(f"the checker of bfcl-eval failed ({reason}); remove {VENV} and run: {INSTALL}")


@cache
def _questions(python: Path) -> Mapping[str, tuple[Item, ...]]:
    """Category -> its items, in the package's order."""
    items: dict[str, list[Item]] = {category: [] for _, categories in GROUPS.values() for category in categories}
    for entry in _ask(python, "prompts", items):
        system, *messages = entry["messages"]
        items[entry["category"]].append(
            Item(
                id=entry["id"],
                prompt=_one_message(messages),
                target={"id": entry["id"], "category": entry["category"]},
                system=system["content"],
                max_new_tokens=MAX_NEW_TOKENS,
            )
        )
    return {category: tuple(listed) for category, listed in items.items()}


def _one_message(messages: Sequence[Mapping[str, str]]) -> str:
    """The user's messages as one; the few conversations with turns of an assistant become one message that quotes them."""
    is_quoted = any(message["role"] != "user" for message in messages)
    return "\n\n".join(f"{each['role']}: {each['content']}" if is_quoted else each["content"] for each in messages)


def _items(name: str, categories: Sequence[str], split: Split, count: int) -> list[Item]:
    """The first `count` items, the categories in turn."""
    if split != "test":
        raise ConfigError(f"{name} has no {split} split; use test")
    questions = _questions(interpreter())
    rows = zip_longest(*(questions[category] for category in categories))
    return list(islice((item for row in rows for item in row if item is not None), count))


def _score(items: Sequence[Item], answers: Sequence[str]) -> list[ItemScore]:
    """bfcl-eval's verdict on each answer."""
    records = [{**item.target, "answer": answer} for item, answer in zip(items, answers, strict=True)]
    return [ItemScore(each["value"], each["calls"], each["problem"]) for each in _ask(interpreter(), "score", records)]
