"""Arithmetic: calculations and word problems with one exact number as the answer.

Owns these questions: reasoning-gym's `chain_sum`, `basic_arithmetic` and `gsm_symbolic`, and word problems of our own.
The work is one operation after the other.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Mapping, Sequence

from unmask.eval.mini5.generator import Generator, Question, gym, seeded
from unmask.eval.mini5.knowledge import PEOPLE

_FORM = "Work it out step by step and end with 'Answer: <number>'."
_NEGATIVE = re.compile(r"(?<![0-9)] )-")
_GOODS = (
    *("apples", "books", "pencils", "stickers", "marbles", "cookies", "stamps", "shells", "coins", "buttons", "cards", "beads"),
    *("flowers", "eggs", "balloons", "tickets", "candles", "photos", "pears", "badges", "ribbons", "postcards", "keys", "toys"),
)
# Templates: a line for each, a question = the expression that answers it.
ONE_STEP = """\
{who} has {a} {goods} and buys {b} more. How many {goods} does {who} have now? = {a} + {b}
{who} has {a} {goods}. {other} has {b} {goods}. How many {goods} do they have together? = {a} + {b}
{who} had {sum} {goods} and gave {b} of them to {other}. How many {goods} does {who} have left? = {sum} - {b}
{other} has {sum} {goods} and {who} has {b}. How many more {goods} does {other} have than {who}? = {sum} - {b}
{who} has {a} boxes with {b} {goods} in each. How many {goods} is that in total? = {a} * {b}
{who} puts {product} {goods} into {b} bags, the same number in each. How many {goods} are in one bag? = {product} / {b}
""".splitlines()
TWO_STEPS = """\
{who} has {a} boxes with {b} {goods} in each and {c} loose {goods}. How many {goods} is that in total? = {a} * {b} + {c}
{who} buys {a} {goods} for {b} dollars each and a bag for {c} dollars. How many dollars is that in total? = {a} * {b} + {c}
{who} had {a} {goods}, found {b} more and then got {c} from {other}. How many {goods} does {who} have now? = {a} + {b} + {c}
{who} had {total} {goods}. {who} gave {b} to {other} and lost {c}. How many {goods} are left? = {total} - {b} - {c}
{who} and {other} each have {a} {goods}. {who} buys {b} more. How many {goods} do they have together? = {a} + {a} + {b}
""".splitlines()
_SIGNS: Mapping[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.floordiv),  # of our own divisions, which leave no remainder
}


def worked(expression: str) -> tuple[int, str]:
    """Value of an expression, and the operations that lead to it: (7, "2 * 5 = 10. 10 - 3 = 7.") for "2 * 5 - 3"."""
    steps: list[str] = []

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        assert isinstance(node, ast.BinOp)
        sign, operation = _SIGNS[type(node.op)]
        left, right = value(node.left), value(node.right)
        steps.append(f"{left} {sign} {right} = {operation(left, right)}.")
        return operation(left, right)

    return value(ast.parse(expression, mode="eval").body), " ".join(steps)


def number(question: str, answer: int | str, work: str = "") -> Question:
    """A question whose answer is a number."""
    return Question(f"{question} {_FORM}", {"kind": "number", "answer": str(answer)}, work=work)


def calculate(expression: str, answer: str) -> Question | None:
    """A question for the value of an expression; None if the given answer is not its value."""
    value, work = worked(expression)
    return number(f"Calculate {expression}.", answer, work) if str(value) == answer else None


def _chain_sum(seed: int) -> Question | None:
    # Three terms: the embedded models' recipes train on sums of two.
    question, answer = gym("chain_sum", seed, min_terms=3, max_terms=3, min_digits=1, max_digits=1)
    return calculate(question.rsplit(":", 1)[-1].strip(" ="), answer)


def _basic_arithmetic(seed: int) -> Question | None:
    # With parentheses only: without them, reasoning-gym 0.1.25 evaluates "6 - 1 * 3" from left to right.
    digits = {"min_digits": 1, "max_digits": 1}
    question, answer = gym(
        "basic_arithmetic", seed, min_terms=2, max_terms=3, operators=["+", "-", "*"], allow_parentheses=True, **digits
    )
    is_plain_sum = "*" not in question and "(" not in question  # as chain_sum makes them
    if is_plain_sum or _NEGATIVE.search(question):
        return None
    return calculate(question.removeprefix("Calculate ").removesuffix("."), answer)


def _gsm_symbolic(seed: int) -> Question | None:
    question, answer = gym("gsm_symbolic", seed)
    if not answer.lstrip("-").isdecimal():
        return None
    return number(question.replace(" Give the result as your final answer. Do not include units.", ""), answer)


def _word_problem(rng: random.Random, templates: Sequence[str], most: Sequence[int]) -> Question:
    """A problem of one of the templates, with a number up to each of `most`."""
    (who, other), goods, template = rng.sample(PEOPLE, 2), rng.choice(_GOODS), rng.choice(templates)
    a, b, *rest = numbers = [rng.randint(2, each) for each in most]
    values = {"a": a, "b": b, "c": sum(rest), "sum": a + b, "product": a * b, "total": sum(numbers)}
    question, expression = template.format(who=who, other=other, goods=goods, **values).split(" = ")
    return number(question, *worked(expression))


GENERATORS = (
    Generator("chain_sum", _chain_sum, max_new_tokens=128),
    Generator("basic_arithmetic", _basic_arithmetic, max_new_tokens=128),
    Generator("one_step", seeded(lambda rng: _word_problem(rng, ONE_STEP, (12, 9))), max_new_tokens=128),
    Generator("two_steps", seeded(lambda rng: _word_problem(rng, TWO_STEPS, (10, 6, 6))), max_new_tokens=128),
    # Its templates were made from the test set of GSM8K: nothing to train on.
    Generator("gsm_symbolic", _gsm_symbolic, max_new_tokens=128, trainable=False),
)
