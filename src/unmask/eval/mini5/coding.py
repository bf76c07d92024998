"""Output prediction: short Python programs, and what they print.

Owns these questions; the programs and their traces, which are the work of an answer, are `program`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from unmask.eval.mini5.generator import Generator, Question, seeded
from unmask.eval.mini5.program import run

_NAMES = ("x", "y", "a", "b", "n", "m", "k", "p", "q")
_WORDS = (
    *("apple", "river", "stone", "cloud", "green", "table", "music", "bread", "light", "tiger"),
    *("paper", "chair", "lemon", "ocean", "plant", "house", "train", "sugar", "glass"),
    *("horse", "night", "smile", "dream", "field", "brush", "candle", "garden", "window"),
)


def _arithmetic(rng: random.Random) -> str:
    first, second = rng.sample(_NAMES, 2)
    steps = f"{first} = {rng.randint(2, 12)}\n{second} = {first} {rng.choice('+-*')} {rng.randint(2, 9)}"
    return f"{steps}\nprint({rng.choice((second, f'{first} + {second}'))})"


def _variables(rng: random.Random) -> str:
    first, second = rng.sample(_NAMES, 2)
    contents = rng.sample(_WORDS, 2) if rng.random() < 0.5 else rng.sample(range(2, 60), 2)
    steps = f"{first} = {contents[0]!r}\n{second} = {contents[1]!r}\n"
    if rng.random() < 0.5:
        steps += f"{first} = {second if rng.random() < 0.5 else rng.randint(60, 99)}\n"
    return f"{steps}print({rng.choice([first, first, second])})"


def _branch(rng: random.Random) -> str:
    tested, result = rng.sample(_NAMES, 2)
    limit, (then, otherwise) = rng.randint(3, 20), rng.sample(_WORDS, 2)
    test = f"if {tested} {rng.choice('<>')} {limit}:\n    {result} = {then!r}\nelse:\n    {result} = {otherwise!r}"
    return f"{tested} = {rng.randint(1, 25)}\n{test}\nprint({result})"


def _loop(rng: random.Random) -> str:
    total, each = rng.sample(_NAMES, 2)
    start = rng.randint(0, 2)
    bounds, listed = f"range({start}, {start + rng.randint(2, 4)})", [rng.randint(1, 9) for _ in range(rng.randint(2, 4))]
    added = rng.choice((each, f"{each} * 2", rng.randint(2, 5)))
    first = f"{total} = {rng.randint(0, 3)}"
    over = bounds if rng.random() < 0.5 else listed
    return f"{first}\nfor {each} in {over}:\n    {total} += {added}\nprint({total})"


def _text(rng: random.Random) -> str:
    (name, other), chosen = rng.sample(("s", "t", "word", "text"), 2), rng.sample(_WORDS, 2)
    printed = (
        rng.choice((f"{name}.upper()", f"{name}.title()", f"len({name})")),
        f"'Hello ' + {name}",
        f"{name}[{rng.choice([0, 1, 2, -1])}]",
        f"{name}[:{rng.randint(2, 3)}]",
        f"{name}[{rng.randint(1, 2)}:4]",
        f"{name} + {other}",
        f"{name} * {rng.randint(2, 3)}",
    )
    return f"{name} = {chosen[0]!r}\n{other} = {chosen[1]!r}\nprint({rng.choice(printed)})"


def _list(rng: random.Random) -> str:
    size = rng.randint(3, 5)
    steps = f"items = {[rng.randint(1, 20) for _ in range(size)]}\n"
    changes = (f"items.append({rng.randint(1, 20)})\n", f"items = items[1:{size}]\n")
    calls = (f"{function}(items)" for function in ("len", "sum", "max", "min", "sorted"))
    printed = ("items", f"items[{rng.choice([0, 1, -1])}]", *calls)
    if rng.random() < 0.6:
        steps += rng.choice(changes)
    return f"{steps}print({rng.choice(printed)})"


_FORM = "What is the output of this Python program? Follow it line by line, then end with 'Output: <what it prints>'."


def _output_of(make: Callable[[random.Random], str]) -> Callable[[int], Question | None]:
    def draw(rng: random.Random) -> Question:
        program = make(rng)
        output, trace = run(program)
        return Question(f"{_FORM}\n\n```python\n{program}\n```", {"kind": "output", "answer": output}, work=trace)

    return seeded(draw)


GENERATORS = tuple(
    Generator(name, _output_of(make), max_new_tokens=128)
    for name, make in (
        *(("variables", _variables), ("arithmetic", _arithmetic), ("branch", _branch)),
        *(("loop", _loop), ("text", _text), ("list", _list)),
    )
)
