"""Harnesses: packages that implement benchmarks, in our process or, against `unmask serve`, in an environment of their own.

Owns how each is installed, found, and told to evaluate a task. Which benchmark needs which is `registry`'s.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

VENVS = "~/.venvs"
"""Where the environments of harnesses are."""
_FIELD = re.compile(r"\{(\w+)\}")
_FIELDS = {"bin", "suites", "url", "model", "task", "out"}


@dataclass(frozen=True)
class Target:
    """What the commands of other harnesses evaluate.

    Attributes:
        url: of the server's API, without a slash at its end.
        model: its name there.
        folder: where the harnesses write, each benchmark in a folder of its own.
    """

    url: str = "http://127.0.0.1:8000/v1"
    model: str = "MODEL"
    folder: str = "out/eval/outside"


LOCAL = Target()
"""What `unmask serve` serves where nothing else is said."""


class Strict(BaseModel):
    """A part of a suite's file: no field but those named."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Harness(Strict):
    """A package that implements benchmarks; the suite's file says what each field means."""

    distribution: str
    version: str
    in_process: bool = False
    asked: bool = False
    extra: str | None = None
    needs: tuple[str, ...] = ()
    no_deps: bool = False
    command: tuple[str, ...] = ()
    no_command: str | None = None
    result: str | None = None

    @field_validator("command", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()

    @model_validator(mode="after")
    def _told(self) -> Harness:
        if not self.is_here and bool(self.command) == bool(self.no_command):
            raise ValueError(f"{self.distribution}: give either its command or, in no_command, why there is none")
        if bool(self.command) != bool(self.result):
            raise ValueError(f"{self.distribution}: say in result where its command leaves the score")
        if unknown := set(_FIELD.findall(" ".join((*self.command, self.result or "")))) - _FIELDS:
            raise ValueError(f"{self.distribution}: its command has the fields {sorted(unknown)}; use {sorted(_FIELDS)}")
        return self

    @property
    def is_here(self) -> bool:
        """Whether `unmask eval` runs its tasks: in its own process, or asking the harness in an environment of its own."""
        return self.in_process or self.asked

    @property
    def requirement(self) -> str:
        """The package itself, as pip is asked for it."""
        return f"{self.distribution}{f'[{self.extra}]' if self.extra else ''}=={self.version}"

    @property
    def install(self) -> str:
        """The command that installs it: a harness that does not run in our process gets an environment of its own."""
        if self.in_process:
            return f"pip install {'--no-deps ' if self.no_deps else ''}{self.requirement}"
        venv = f"{VENVS}/{self.distribution}"
        steps = [["--no-deps", self.requirement], self.needs] if self.no_deps else [[self.requirement, *self.needs]]
        return " && ".join([f"python -m venv {venv}", *(f"{venv}/bin/pip install {shlex.join(step)}" for step in steps)])

    def told(self, benchmark: str, tasks: Sequence[str], target: Target) -> tuple[tuple[str, ...], str | None]:
        """The shell commands that evaluate a benchmark's tasks against a server, in their order, and where the score stands."""
        commands = tuple(self._fill(step, benchmark, tasks, target) for step in self.command)
        return commands, self._fill(self.result, benchmark, tasks, target) if self.result else None

    def _fill(self, template: str, benchmark: str, tasks: Sequence[str], target: Target) -> str:
        values = {
            "bin": f"{VENVS}/{self.distribution}/bin",
            "suites": shlex.quote(str(importlib.resources.files("unmask.eval") / "suites")),
            "url": shlex.quote(target.url),
            "model": shlex.quote(target.model),
            "task": shlex.join(tasks),
            "out": shlex.quote(f"{target.folder}/{benchmark.lower().replace(' ', '-')}"),
        }
        return _FIELD.sub(lambda match: values[match[1]], template)


def find_harnesses(harnesses: Mapping[str, Harness], venvs: Path | None = None) -> dict[str, str]:
    """Version of each harness that is installed.

    Args:
        harnesses: name -> harness.
        venvs: folder of the environments of those that do not run in our process, each under its distribution's name;
            `~/.venvs` where None. Those that run in our process are looked for in its environment.
    """
    folder = Path(VENVS).expanduser() if venvs is None else venvs
    found: dict[str, str] = {}
    for name, harness in harnesses.items():
        own = (folder / harness.distribution).glob("lib/python*/site-packages")
        places = sys.path if harness.in_process else [str(place) for place in own]
        for installed in importlib.metadata.distributions(name=harness.distribution, path=places):
            found.setdefault(name, installed.version)
    return found
