"""A small subset of Python: expressions and statements, with their source text and an interpreter of their own.

Owns the syntax tree and what it prints; no program is ever executed as text. Values are integers, strings and lists of
integers. Running a program also gives a trace, which is the work of an answer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {"len": len, "sum": sum, "max": max, "min": min, "sorted": sorted}
_METHODS: Mapping[str, Callable[[str], str]] = {"upper": str.upper, "lower": str.lower, "title": str.title}
Values = dict[str, Any]


@dataclass(frozen=True)
class Constant:
    """A number, string or list."""

    content: Any

    def text(self, values: Values | None = None) -> str:
        return repr(self.content)

    def value(self, values: Values) -> Any:
        return list(self.content) if isinstance(self.content, list) else self.content


@dataclass(frozen=True)
class Variable:
    """A variable; a trace shows its value instead, unless that is a list."""

    name: str

    def text(self, values: Values | None = None) -> str:
        return self.name if values is None or isinstance(values[self.name], list) else repr(values[self.name])

    def value(self, values: Values) -> Any:
        return values[self.name]


@dataclass(frozen=True)
class Binary:
    """A binary operation; an operand that is one itself stands in brackets."""

    left: Expression
    sign: str
    right: Expression

    def text(self, values: Values | None = None) -> str:
        texts = ((each, each.text(values)) for each in (self.left, self.right))
        return f" {self.sign} ".join(f"({text})" if isinstance(each, Binary) else text for each, text in texts)

    def value(self, values: Values) -> Any:
        return _BINARY[self.sign](self.left.value(values), self.right.value(values))


@dataclass(frozen=True)
class BuiltinCall:
    """A call of a built-in function with one argument, or of a string's method with none."""

    name: str
    operand: Expression

    def text(self, values: Values | None = None) -> str:
        return (
            f"{self.operand.text(values)}.{self.name}()"
            if self.name in _METHODS
            else f"{self.name}({self.operand.text(values)})"
        )

    def value(self, values: Values) -> Any:
        return (_METHODS if self.name in _METHODS else FUNCTIONS)[self.name](self.operand.value(values))


@dataclass(frozen=True)
class Subscript:
    """An element (`last` and `step` are None) or a slice."""

    operand: Expression
    first: int | None
    last: int | None = None
    step: int | None = None

    def text(self, values: Values | None = None) -> str:
        if self.last is None and self.step is None:
            return f"{self.operand.text(values)}[{self.first}]"
        first, last = ("" if each is None else each for each in (self.first, self.last))
        return f"{self.operand.text(values)}[{first}:{last}{'' if self.step is None else f':{self.step}'}]"

    def value(self, values: Values) -> Any:
        whole = self.operand.value(values)
        is_one = self.last is None and self.step is None
        return whole[self.first] if is_one else whole[slice(self.first, self.last, self.step)]


Expression = Constant | Variable | Binary | BuiltinCall | Subscript


@dataclass(frozen=True)
class Assign:
    """`name = value`, or `name += value` where `sign` is "+"."""

    name: str
    to: Expression
    sign: str = ""

    def lines(self) -> list[str]:
        return [f"{self.name} {self.sign}= {self.to.text()}"]

    def run(self, values: Values) -> list[str]:
        new, computation = self.to.value(values), self.to.text(values)
        if self.sign:
            computation = f"{values[self.name]!r} {self.sign} {new!r}"
            new = _BINARY[self.sign](values[self.name], new)
        values[self.name] = new
        return [_equal(self.name, computation, repr(new))]


@dataclass(frozen=True)
class Append:
    """`name.append(value)`."""

    name: str
    what: Expression

    def lines(self) -> list[str]:
        return [f"{self.name}.append({self.what.text()})"]

    def run(self, values: Values) -> list[str]:
        values[self.name] = [*values[self.name], self.what.value(values)]
        return [_equal(self.name, repr(values[self.name]))]


@dataclass(frozen=True)
class If:
    """Two branches of one assignment each."""

    condition: Expression
    then: Assign
    otherwise: Assign

    def lines(self) -> list[str]:
        then, otherwise = (f"    {each.lines()[0]}" for each in (self.then, self.otherwise))
        return [f"if {self.condition.text()}:", then, "else:", otherwise]

    def run(self, values: Values) -> list[str]:
        holds = self.condition.value(values)
        return [f"{self.condition.text(values)} is {holds}", *(self.then if holds else self.otherwise).run(values)]


@dataclass(frozen=True)
class Loop:
    """`for name in over:` with one statement; `over` is a list, or the bounds of a range."""

    name: str
    over: tuple[int, int] | Expression
    body: Assign

    def lines(self) -> list[str]:
        over = f"range({self.over[0]}, {self.over[1]})" if isinstance(self.over, tuple) else self.over.text()
        return [f"for {self.name} in {over}:", f"    {self.body.lines()[0]}"]

    def run(self, values: Values) -> list[str]:
        trace = []
        for each in range(*self.over) if isinstance(self.over, tuple) else self.over.value(values):
            values[self.name] = each
            trace += [f"{self.name} = {each!r}: {line}" for line in self.body.run(values)]
        return trace


def _equal(*sides: str) -> str:
    return " = ".join(dict.fromkeys(sides))


Statement = Assign | Append | If | Loop


@dataclass(frozen=True)
class Program:
    """Statements, then `print` of one value."""

    statements: tuple[Statement, ...]
    printed: Expression

    def text(self) -> str:
        """Its source."""
        return "\n".join([*(line for each in self.statements for line in each.lines()), f"print({self.printed.text()})"])

    def run(self) -> tuple[str, str]:
        """Its output, and a trace: a line for each statement, with values in place of names."""
        values: Values = {}
        trace = [line for each in self.statements for line in each.run(values)]
        printed = self.printed.value(values)
        if not isinstance(self.printed, Variable):
            trace.append(_equal(self.printed.text(values), repr(printed)))
        return str(printed), "\n".join(trace)
