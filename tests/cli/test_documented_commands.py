"""Every `unmask` command that the README and the documentation show is one that the program understands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from unmask.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "deploy" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
SHELL = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"`(unmask [a-z]+ [^`]*--?\w[^`]*)`")
END = re.compile(r"\s(?:#|\||<|>|&).*")
"""Where a command ends and the shell's business begins."""


def shown(page: Path) -> list[str]:
    """Commands of a page's shell blocks."""
    lines = [line for block in SHELL.findall(page.read_text()) for line in block.replace("\\\n", " ").splitlines()]
    return [END.sub("", line[line.index("unmask ") :]) for line in lines if re.search(r"^(?:.*\| )?unmask [a-z]", line)]


def quoted(page: Path) -> list[str]:
    """Commands in a page's text, which may leave arguments out."""
    return [" ".join(command.split()) for command in QUOTED.findall(page.read_text())]


@pytest.fixture(scope="module")
def verbs() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_commands_are_found() -> None:
    assert sum(len(shown(page)) for page in PAGES) > 50
    assert sum(len(quoted(page)) for page in PAGES) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page_are_understood(page: Path, verbs: dict[str, Any]) -> None:
    for command in shown(page):
        verb, *words = shlex.split(command)[1:]
        try:
            verbs[verb].make_context(verb, words)
        except Exception as error:
            pytest.fail(f"{command}: {error!r} {getattr(error, 'message', '')}")
    for command in quoted(page):
        verb, *words = command.split()[1:]
        options = {name for parameter in verbs[verb].params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert options >= {word for word in words if re.match(r"--?[a-z]", word)}, command
