"""What the tests of mini-5 share: the items of one generator, and the score of one answer."""

from __future__ import annotations

from typing import Any

from unmask.eval.mini5.generator import take_turns
from unmask.eval.mini5.scoring import score
from unmask.eval.mini5.tasks import GENERATORS
from unmask.eval.task import Dimension, Item


def generator_names(dimension: Dimension) -> list[str]:
    return [generator.name for generator in GENERATORS[dimension]]


def items_of(dimension: Dimension, name: str, count: int = 150) -> list[Item]:
    (generator,) = [generator for generator in GENERATORS[dimension] if generator.name == name]
    return take_turns(dimension, (generator,), "test", count)


def value(target: dict[str, Any], answer: str) -> float:
    return score([Item("x", "?", target)], [answer])[0].value
