"""Output prediction: short Python programs, and what they print.

Owns a small language of expressions and statements, as text and as a computation of its own: no program is ever executed as
text. Values are integers, strings, and lists of integers. A computation tells what it does: that is the work of an answer.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.eval.mini5_families import Draw, Family, seeded

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
_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {"len": len, "sum": sum, "max": max, "min": min, "sorted": sorted}
_METHODS: Mapping[str, Callable[[str], str]] = {"upper": str.upper, "lower": str.lower, "title": str.title}
_NAMES = ("x", "y", "a", "b", "n", "m", "k", "p", "q")
_WORDS = (
    *(
        "apple",
        "river",
        "stone",
        "cloud",
        "green",
        "table",
        "music",
        "bread",
        "light",
        "tiger",
        "paper",
        "chair",
        "lemon",
        "ocean",
    ),
    *(
        "plant",
        "house",
        "train",
        "sugar",
        "glass",
        "horse",
        "night",
        "smile",
        "dream",
        "field",
        "brush",
        "candle",
        "garden",
        "window",
    ),
)
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
class Name:
    """A variable; in a trace, what it holds, unless that is a list."""

    name: str

    def text(self, values: Values | None = None) -> str:
        return self.name if values is None or isinstance(values[self.name], list) else repr(values[self.name])

    def value(self, values: Values) -> Any:
        return values[self.name]


@dataclass(frozen=True)
class Binary:
    """Two operands that need no brackets, or get them."""

    left: Expression
    sign: str
    right: Expression

    def text(self, values: Values | None = None) -> str:
        texts = ((each, each.text(values)) for each in (self.left, self.right))
        return f" {self.sign} ".join(f"({text})" if isinstance(each, Binary) else text for each, text in texts)

    def value(self, values: Values) -> Any:
        return _BINARY[self.sign](self.left.value(values), self.right.value(values))


@dataclass(frozen=True)
class Call:
    """A built-in function of one argument, or a method of a string without any."""

    name: str
    of: Expression

    def text(self, values: Values | None = None) -> str:
        return f"{self.of.text(values)}.{self.name}()" if self.name in _METHODS else f"{self.name}({self.of.text(values)})"

    def value(self, values: Values) -> Any:
        return (_METHODS if self.name in _METHODS else _FUNCTIONS)[self.name](self.of.value(values))


@dataclass(frozen=True)
class Part:
    """An element (`last` is None) or a slice."""

    of: Expression
    first: int | None
    last: int | None = None
    step: int | None = None

    def text(self, values: Values | None = None) -> str:
        if self.last is None and self.step is None:
            return f"{self.of.text(values)}[{self.first}]"
        first, last = ("" if each is None else each for each in (self.first, self.last))
        return f"{self.of.text(values)}[{first}:{last}{'' if self.step is None else f':{self.step}'}]"

    def value(self, values: Values) -> Any:
        whole = self.of.value(values)
        is_one = self.last is None and self.step is None
        return whole[self.first] if is_one else whole[slice(self.first, self.last, self.step)]


Expression = Constant | Name | Binary | Call | Part


@dataclass(frozen=True)
class Assign:
    """`name = value`, or `name += value` where `sign` is "+"."""

    name: str
    to: Expression
    sign: str = ""

    def lines(self) -> list[str]:
        return [f"{self.name} {self.sign}= {self.to.text()}"]

    def run(self, values: Values) -> list[str]:
        new, done = self.to.value(values), self.to.text(values)
        if self.sign:
            done = f"{values[self.name]!r} {self.sign} {new!r}"
            new = _BINARY[self.sign](values[self.name], new)
        values[self.name] = new
        return [_equal(self.name, done, repr(new))]


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
    """Statements, then a print of one value."""

    statements: tuple[Statement, ...]
    printed: Expression

    def text(self) -> str:
        """Its source."""
        return "\n".join([*(line for each in self.statements for line in each.lines()), f"print({self.printed.text()})"])

    def run(self) -> tuple[str, str]:
        """What it prints, and what each statement does on the way: a line each, of values in place of names."""
        values: Values = {}
        trace = [line for each in self.statements for line in each.run(values)]
        printed = self.printed.value(values)
        if not isinstance(self.printed, Name):
            trace.append(_equal(self.printed.text(values), repr(printed)))
        return str(printed), "\n".join(trace)


def _number(rng: random.Random, low: int = 1, high: int = 9) -> Constant:
    return Constant(rng.randint(low, high))


def _arithmetic(rng: random.Random) -> Program:
    first, second = rng.sample(_NAMES, 2)
    steps = (
        Assign(first, _number(rng, 2, 12)),
        Assign(second, Binary(Name(first), rng.choice("+-*"), _number(rng, 2, 9))),
    )
    printed: Sequence[Expression] = (Name(second), Binary(Name(first), "+", Name(second)))
    return Program(steps, rng.choice(printed))


def _variables(rng: random.Random) -> Program:
    first, second = rng.sample(_NAMES, 2)
    contents = rng.sample(_WORDS, 2) if rng.random() < 0.5 else rng.sample(range(2, 60), 2)
    steps = [Assign(first, Constant(contents[0])), Assign(second, Constant(contents[1]))]
    if rng.random() < 0.5:
        steps.append(Assign(first, Name(second) if rng.random() < 0.5 else _number(rng, 60, 99)))
    return Program(tuple(steps), Name(rng.choice([first, first, second])))


def _branch(rng: random.Random) -> Program:
    tested, result = rng.sample(_NAMES, 2)
    limit, chosen = _number(rng, 3, 20), rng.sample(_WORDS, 2)
    test = If(
        Binary(Name(tested), rng.choice("<>"), limit), Assign(result, Constant(chosen[0])), Assign(result, Constant(chosen[1]))
    )
    return Program((Assign(tested, _number(rng, 1, 25)), test), Name(result))


def _loop(rng: random.Random) -> Program:
    total, each = rng.sample(_NAMES, 2)
    start = rng.randint(0, 2)
    bounds, listed = (start, start + rng.randint(2, 4)), Constant([rng.randint(1, 9) for _ in range(rng.randint(2, 4))])
    added: Sequence[Expression] = (Name(each), Binary(Name(each), "*", Constant(2)), _number(rng, 2, 5))
    body = Assign(total, rng.choice(added), "+")
    return Program((Assign(total, _number(rng, 0, 3)), Loop(each, bounds if rng.random() < 0.5 else listed, body)), Name(total))


def _text(rng: random.Random) -> Program:
    (name, other), chosen = rng.sample(("s", "t", "word", "text"), 2), rng.sample(_WORDS, 2)
    it = Name(name)
    printed: Sequence[Expression] = (
        Call(rng.choice(("upper", "title", "len")), it),
        Binary(Constant("Hello "), "+", it),
        Part(it, rng.choice([0, 1, 2, -1])),
        Part(it, None, rng.randint(2, 3)),
        Part(it, rng.randint(1, 2), 4),
        Binary(it, "+", Name(other)),
        Binary(it, "*", Constant(rng.randint(2, 3))),
    )
    return Program((Assign(name, Constant(chosen[0])), Assign(other, Constant(chosen[1]))), rng.choice(printed))


def _list(rng: random.Random) -> Program:
    it = Name("items")
    size = rng.randint(3, 5)
    start = Assign("items", Constant([rng.randint(1, 20) for _ in range(size)]))
    changes: Sequence[Statement] = (Append("items", _number(rng, 1, 20)), Assign("items", Part(it, 1, size)))
    printed: Sequence[Expression] = (it, Part(it, rng.choice([0, 1, -1])), *(Call(each, it) for each in _FUNCTIONS))
    statements: tuple[Statement, ...] = (start, rng.choice(changes)) if rng.random() < 0.6 else (start,)
    return Program(statements, rng.choice(printed))


_ASKED = "What is the output of this Python program? Follow it line by line, then end with 'Output: <what it prints>'."


def _asked(make: Callable[[random.Random], Program]) -> Callable[[int], Draw | None]:
    def draw(rng: random.Random) -> Draw:
        program = make(rng)
        output, trace = program.run()
        return Draw(f"{_ASKED}\n\n```python\n{program.text()}\n```", {"kind": "output", "answer": output}, work=trace)

    return seeded(draw)


FAMILIES = tuple(
    Family(name, _asked(make), max_new_tokens=128)
    for name, make in (
        ("variables", _variables),
        ("arithmetic", _arithmetic),
        ("branch", _branch),
        ("loop", _loop),
        ("text", _text),
        ("list", _list),
    )
)
