"""Arithmetic: sums in figures and in words, one exact number each.

Owns these questions: reasoning-gym's `chain_sum`, `basic_arithmetic` and `gsm_symbolic`, and word problems of our own.
The work is one operation after the other.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping

from unmask.eval.mini5_families import Draw, Family, gym, seeded
from unmask.eval.mini5_knowledge import PEOPLE

_FORM = "Work it out step by step and end with 'Answer: <number>'."
_NEGATIVE = re.compile(r"(?<![0-9)] )-")
_GOODS = (
    *("apples", "books", "pencils", "stickers", "marbles", "cookies", "stamps", "shells", "coins", "buttons", "cards", "beads"),
    *("flowers", "eggs", "balloons", "tickets", "candles", "photos", "pears", "badges", "ribbons", "postcards", "keys", "toys"),
)
# Questions, and the sum in figures that answers each.
_ONE_STEP = (
    ("{who} has {a} {goods} and buys {b} more. How many {goods} does {who} have now?", "{a} + {b}"),
    ("{who} has {a} {goods}. {other} has {b} {goods}. How many {goods} do they have together?", "{a} + {b}"),
    ("{who} had {sum} {goods} and gave {b} of them to {other}. How many {goods} does {who} have left?", "{sum} - {b}"),
    ("{other} has {sum} {goods} and {who} has {b}. How many more {goods} does {other} have than {who}?", "{sum} - {b}"),
    ("{who} has {a} boxes with {b} {goods} in each. How many {goods} is that in total?", "{a} * {b}"),
    (
        "{who} puts {product} {goods} into {b} bags, the same number in each. How many {goods} are in one bag?",
        "{product} / {b}",
    ),
)
_TWO_STEPS = (
    (
        "{who} has {a} boxes with {b} {goods} in each and {c} loose {goods}. How many {goods} is that in total?",
        "{a} * {b} + {c}",
    ),
    (
        "{who} buys {a} {goods} for {b} dollars each and a bag for {c} dollars. How many dollars is that in total?",
        "{a} * {b} + {c}",
    ),
    (
        "{who} had {a} {goods}, found {b} more and then got {c} from {other}. How many {goods} does {who} have now?",
        "{a} + {b} + {c}",
    ),
    (
        "{who} had {total} {goods}. {who} gave {b} to {other} and lost {c}. How many {goods} are left?",
        "{total} - {b} - {c}",
    ),
    (
        "{who} and {other} each have {a} {goods}. {who} buys {b} more. How many {goods} do they have together?",
        "{a} + {a} + {b}",
    ),
)
_SIGNS: Mapping[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.floordiv),  # of our own divisions, which leave no rest
}


def worked(sum_: str) -> tuple[int, str]:
    """The value of a sum in figures, and the operations that lead to it: (7, "2 * 5 = 10. 10 - 3 = 7.")."""
    steps: list[str] = []

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        assert isinstance(node, ast.BinOp)
        sign, operation = _SIGNS[type(node.op)]
        left, right = value(node.left), value(node.right)
        steps.append(f"{left} {sign} {right} = {operation(left, right)}.")
        return operation(left, right)

    return value(ast.parse(sum_, mode="eval").body), " ".join(steps)


def number(question: str, answer: int | str, work: str = "") -> Draw:
    """A question whose answer is a number."""
    return Draw(f"{question} {_FORM}", {"kind": "number", "answer": str(answer)}, work=work)


def _calculate(sum_: str, answer: str) -> Draw | None:
    value, work = worked(sum_)
    return number(f"Calculate {sum_}.", answer, work) if str(value) == answer else None


def _chain_sum(seed: int) -> Draw | None:
    # Three terms: the embedded model's recipes train on sums of two.
    question, answer = gym("chain_sum", seed, min_terms=3, max_terms=3, min_digits=1, max_digits=1)
    return _calculate(question.rsplit(":", 1)[-1].strip(" ="), answer)


def _basic_arithmetic(seed: int) -> Draw | None:
    # With parentheses only: without them, reasoning-gym 0.1.25 works out "6 - 1 * 3" from left to right.
    question, answer = gym(
        "basic_arithmetic",
        seed,
        min_terms=2,
        max_terms=3,
        min_digits=1,
        max_digits=1,
        operators=["+", "-", "*"],
        allow_parentheses=True,
    )
    is_plain_sum = "*" not in question and "(" not in question  # as chain_sum makes them
    if is_plain_sum or _NEGATIVE.search(question):
        return None
    return _calculate(question.removeprefix("Calculate ").removesuffix("."), answer)


def _gsm_symbolic(seed: int) -> Draw | None:
    question, answer = gym("gsm_symbolic", seed)
    if not answer.lstrip("-").isdecimal():
        return None
    return number(question.replace(" Give the result as your final answer. Do not include units.", ""), answer)


def _one_step(rng: random.Random) -> Draw:
    (who, other), goods, (question, sum_) = rng.sample(PEOPLE, 2), rng.choice(_GOODS), rng.choice(_ONE_STEP)
    a, b = rng.randint(2, 12), rng.randint(2, 9)
    values = {"who": who, "other": other, "goods": goods, "a": a, "b": b, "sum": a + b, "product": a * b}
    return number(question.format(**values), *worked(sum_.format(**values)))


def _two_steps(rng: random.Random) -> Draw:
    (who, other), goods, (question, sum_) = rng.sample(PEOPLE, 2), rng.choice(_GOODS), rng.choice(_TWO_STEPS)
    a, b, c = rng.randint(2, 10), rng.randint(2, 6), rng.randint(2, 6)
    values = {"who": who, "other": other, "goods": goods, "a": a, "b": b, "c": c, "total": a + b + c}
    return number(question.format(**values), *worked(sum_.format(**values)))


FAMILIES = (
    Family("chain_sum", _chain_sum, max_new_tokens=128),
    Family("basic_arithmetic", _basic_arithmetic, max_new_tokens=128),
    Family("one_step", seeded(_one_step), max_new_tokens=128),
    Family("two_steps", seeded(_two_steps), max_new_tokens=128),
    # Its templates were made from the test set of GSM8K: nothing to train on.
    Family("gsm_symbolic", _gsm_symbolic, max_new_tokens=128, trainable=False),
)
