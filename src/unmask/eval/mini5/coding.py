"""Output prediction: short Python programs, and what they print.

Owns these questions; the programs and their traces, which are the work of an answer, are `program`'s.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from unmask.eval.mini5.generator import Generator, Question, seeded
from unmask.eval.mini5.program import (
    FUNCTIONS,
    Append,
    Assign,
    Binary,
    BuiltinCall,
    Constant,
    Expression,
    If,
    Loop,
    Program,
    Statement,
    Subscript,
    Variable,
)

_NAMES = ("x", "y", "a", "b", "n", "m", "k", "p", "q")
_WORDS = (
    *("apple", "river", "stone", "cloud", "green", "table", "music", "bread", "light", "tiger"),
    *("paper", "chair", "lemon", "ocean", "plant", "house", "train", "sugar", "glass"),
    *("horse", "night", "smile", "dream", "field", "brush", "candle", "garden", "window"),
)


def _number(rng: random.Random, low: int = 1, high: int = 9) -> Constant:
    return Constant(rng.randint(low, high))


def _arithmetic(rng: random.Random) -> Program:
    first, second = rng.sample(_NAMES, 2)
    steps = (
        Assign(first, _number(rng, 2, 12)),
        Assign(second, Binary(Variable(first), rng.choice("+-*"), _number(rng, 2, 9))),
    )
    printed: Sequence[Expression] = (Variable(second), Binary(Variable(first), "+", Variable(second)))
    return Program(steps, rng.choice(printed))


def _variables(rng: random.Random) -> Program:
    first, second = rng.sample(_NAMES, 2)
    contents = rng.sample(_WORDS, 2) if rng.random() < 0.5 else rng.sample(range(2, 60), 2)
    steps = [Assign(first, Constant(contents[0])), Assign(second, Constant(contents[1]))]
    if rng.random() < 0.5:
        steps.append(Assign(first, Variable(second) if rng.random() < 0.5 else _number(rng, 60, 99)))
    return Program(tuple(steps), Variable(rng.choice([first, first, second])))


def _branch(rng: random.Random) -> Program:
    tested, result = rng.sample(_NAMES, 2)
    limit, chosen = _number(rng, 3, 20), rng.sample(_WORDS, 2)
    test = If(
        Binary(Variable(tested), rng.choice("<>"), limit),
        Assign(result, Constant(chosen[0])),
        Assign(result, Constant(chosen[1])),
    )
    return Program((Assign(tested, _number(rng, 1, 25)), test), Variable(result))


def _loop(rng: random.Random) -> Program:
    total, each = rng.sample(_NAMES, 2)
    start = rng.randint(0, 2)
    bounds, listed = (start, start + rng.randint(2, 4)), Constant([rng.randint(1, 9) for _ in range(rng.randint(2, 4))])
    added: Sequence[Expression] = (Variable(each), Binary(Variable(each), "*", Constant(2)), _number(rng, 2, 5))
    body = Assign(total, rng.choice(added), "+")
    return Program(
        (Assign(total, _number(rng, 0, 3)), Loop(each, bounds if rng.random() < 0.5 else listed, body)), Variable(total)
    )


def _text(rng: random.Random) -> Program:
    (name, other), chosen = rng.sample(("s", "t", "word", "text"), 2), rng.sample(_WORDS, 2)
    it = Variable(name)
    printed: Sequence[Expression] = (
        BuiltinCall(rng.choice(("upper", "title", "len")), it),
        Binary(Constant("Hello "), "+", it),
        Subscript(it, rng.choice([0, 1, 2, -1])),
        Subscript(it, None, rng.randint(2, 3)),
        Subscript(it, rng.randint(1, 2), 4),
        Binary(it, "+", Variable(other)),
        Binary(it, "*", Constant(rng.randint(2, 3))),
    )
    return Program((Assign(name, Constant(chosen[0])), Assign(other, Constant(chosen[1]))), rng.choice(printed))


def _list(rng: random.Random) -> Program:
    it = Variable("items")
    size = rng.randint(3, 5)
    start = Assign("items", Constant([rng.randint(1, 20) for _ in range(size)]))
    changes: Sequence[Statement] = (Append("items", _number(rng, 1, 20)), Assign("items", Subscript(it, 1, size)))
    printed: Sequence[Expression] = (it, Subscript(it, rng.choice([0, 1, -1])), *(BuiltinCall(each, it) for each in FUNCTIONS))
    statements: tuple[Statement, ...] = (start, rng.choice(changes)) if rng.random() < 0.6 else (start,)
    return Program(statements, rng.choice(printed))


_FORM = "What is the output of this Python program? Follow it line by line, then end with 'Output: <what it prints>'."


def _output_of(make: Callable[[random.Random], Program]) -> Callable[[int], Question | None]:
    def draw(rng: random.Random) -> Question:
        program = make(rng)
        output, trace = program.run()
        return Question(f"{_FORM}\n\n```python\n{program.text()}\n```", {"kind": "output", "answer": output}, work=trace)

    return seeded(draw)


GENERATORS = tuple(
    Generator(name, _output_of(make), max_new_tokens=128)
    for name, make in (
        *(("variables", _variables), ("arithmetic", _arithmetic), ("branch", _branch)),
        *(("loop", _loop), ("text", _text), ("list", _list)),
    )
)
