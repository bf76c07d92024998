"""Needle tests for long contexts: a few facts inside a long text, and a question about them (after RULER).

Owns the text, the positions of the facts and the scoring. The text is generated sentence by sentence: nothing is downloaded.
Knows no model; `count_tokens` measures a prompt.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from unmask.errors import ConfigError
from unmask.eval.mini5.generator import SPLITS, distinct
from unmask.eval.mini5.knowledge import COLOURS, JOBS, PEOPLE, THINGS, place
from unmask.eval.task import Dimension, Item, ItemScore, Split, Task

CountTokens = Callable[[str], int]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MAX_NEW_TOKENS = 64
_NUMBER = re.compile(r"(?<![0-9])[0-9]{6}(?![0-9])")
_VARIABLE = re.compile(r"(?<![A-Za-z])[A-Z]{4}(?![A-Za-z])")
_VERBS = (
    *("cleaned", "bought", "painted", "carried", "lost", "found"),
    *("sold", "borrowed", "repaired", "kept", "dropped", "admired"),
)
_WHEN = (
    *("before breakfast", "in the evening", "on a rainy day", "after work"),
    *("at noon", "last summer", "in the morning", "at night"),
)
_WHERE = ("near the station", "behind the school", "at the market", "by the lake", "in the garden", "on the bridge")


@dataclass(frozen=True)
class Needles:
    """Facts to hide, the question about them, and everything that a right answer names.

    `in_order`: the facts keep their order in the text; otherwise the first stands at the requested depth.
    """

    facts: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    in_order: bool = False


def _keys(rng: random.Random, count: int) -> list[str]:
    return distinct(lambda: f"{rng.choice(COLOURS)}-{rng.choice(JOBS)}-{rng.choice(THINGS)}", count)


def _numbers(rng: random.Random, split: Split, count: int) -> list[str]:
    """Different numbers of six digits; their remainder modulo 3 is that of the split, so that no two splits share a number."""
    return [str(3 * third + SPLITS.index(split)) for third in rng.sample(range(33_334, 333_333), count)]


def _fact(key: str, number: str) -> str:
    return f"The secret number of {key} is {number}."


def _one_value(num_keys: int, rng: random.Random, split: Split) -> Needles:
    keys, numbers = _keys(rng, num_keys), _numbers(rng, split, num_keys)
    facts = tuple(map(_fact, keys, numbers))
    return Needles(facts, f"What is the secret number of {keys[0]}? Answer with the number only.", (numbers[0],))


def _multi_value(rng: random.Random, split: Split) -> Needles:
    (key,), numbers = _keys(rng, 1), _numbers(rng, split, 4)
    facts = tuple(_fact(key, number) for number in numbers)
    return Needles(facts, f"What are all four secret numbers of {key}? Answer with the numbers only.", tuple(numbers))


def _tracking(rng: random.Random, split: Split) -> Needles:
    """Two chains of three variables, each with one value."""
    names = distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=4)), 6)
    numbers = _numbers(rng, split, 2)
    facts = [
        fact
        for (first, second, third), number in zip((names[:3], names[3:]), numbers, strict=True)
        for fact in (f"VAR {first} = {number}.", f"VAR {second} = VAR {first}.", f"VAR {third} = VAR {second}.")
    ]
    question = f"Which three variables have the value {numbers[0]}? Answer with their names only."
    return Needles(tuple(facts), question, tuple(names[:3]), in_order=True)


_KINDS: tuple[tuple[str, Dimension, Callable[[random.Random, Split], Needles]], ...] = (
    ("single", "knowledge", partial(_one_value, 1)),
    ("multi_key", "knowledge", partial(_one_value, 4)),
    ("multi_value", "knowledge", _multi_value),
    ("tracking", "reasoning", _tracking),
)


def filler(rng: random.Random) -> str:
    """A sentence of filler text, without digits or words in capitals."""
    is_named, name, job = rng.random() < 0.5, rng.choice(PEOPLE), rng.choice(JOBS)
    who, who_later = (name, name) if is_named else (f"The {job}", f"the {job}")
    thing = f"the {rng.choice(COLOURS)} {rng.choice(THINGS)}"
    forms = (
        f"{who} {rng.choice(_VERBS)} {thing} {rng.choice(_WHEN)}.",
        f"{rng.choice(_WHEN).capitalize()}, {who_later} went to {place(rng)}.",
        f"{who} {rng.choice(_VERBS)} {thing} {rng.choice(_WHERE)} in {place(rng)}.",
        f"In {place(rng)}, people say that {thing} was {rng.choice(_VERBS)} {rng.choice(_WHERE)}.",
    )
    return rng.choice(forms)


def needle_tasks(lengths: Sequence[int], count_tokens: CountTokens, *, depths: Sequence[float] = DEPTHS) -> tuple[Task, ...]:
    """Four tasks for every context length: "needle/single/4096", "needle/multi_key/4096", ...

    Args:
        lengths: most tokens of a prompt and its answer together.
        count_tokens: number of tokens of a user's message as the model reads it (with the chat template, if it uses one).
        depths: position of the first fact, from 0 (start) to 1 (end), in turn. Further facts are spread evenly.

    Raises:
        ConfigError: there is no depth, or one is outside [0, 1]. A length too short for the question is an error of `items`.
    """
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(f"depths is {list(depths)}; it must be one or more numbers in [0, 1], such as 0.5")
    return tuple(
        Task(
            name=f"needle/{kind}/{length}",
            dimension=dimension,
            metric="exact match",
            version="1",
            licence="Apache-2.0",
            source="generated by unmask, after RULER (arXiv:2404.06654)",
            items=partial(_items, kind, make, length, count_tokens, tuple(depths)),
            score=partial(_score, _VARIABLE if kind == "tracking" else _NUMBER),
        )
        for length in lengths
        for kind, dimension, make in _KINDS
    )


def _items(
    kind: str,
    make: Callable[[random.Random, Split], Needles],
    length: int,
    count_tokens: CountTokens,
    depths: tuple[float, ...],
    split: Split,
    count: int,
) -> list[Item]:
    items = []
    for index in range(count):
        rng = random.Random(f"needle/{kind}/{length}/{split}/{index}")
        needles, depth = make(rng, split), depths[index % len(depths)]
        prompt = _fill(needles, depth, rng, length - _MAX_NEW_TOKENS, count_tokens)
        items.append(
            Item(f"{kind}/{length}/{depth:g}/{split}/{index}", prompt, list(needles.answers), max_new_tokens=_MAX_NEW_TOKENS)
        )
    return items


def _fill(needles: Needles, depth: float, rng: random.Random, budget: int, count_tokens: CountTokens) -> str:
    """The prompt with the longest text around the facts that fits the budget."""
    if (needed := count_tokens(_prompt(needles, depth, ()))) > budget:
        raise ConfigError(
            f"{budget + _MAX_NEW_TOKENS} tokens do not fit a question of {needed} and an answer of up to {_MAX_NEW_TOKENS}; "
            "use a longer context"
        )
    hay: list[str] = []

    def fits(sentences: int) -> bool:
        hay.extend(filler(rng) for _ in range(sentences - len(hay)))
        return count_tokens(_prompt(needles, depth, hay[:sentences])) <= budget

    fitting, too_many = 0, 8
    while fits(too_many):
        fitting, too_many = too_many, 2 * too_many
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return _prompt(needles, depth, hay[:fitting])


def _prompt(needles: Needles, depth: float, hay: Sequence[str]) -> str:
    """Filler text with the first fact at `depth`, and each further one an equal part of the text later, wrapping around."""
    steps = [depth + i / len(needles.facts) for i in range(len(needles.facts))]
    positions = [round((step if step <= 1 else step - 1) * len(hay)) for step in steps]
    if needles.in_order:
        positions.sort()
    text: list[str] = []
    start = 0
    for position, fact in sorted(zip(positions, needles.facts, strict=True), key=lambda pair: pair[0]):
        text += [*hay[start:position], fact]
        start = position
    return f"Read this text.\n\n{' '.join([*text, *hay[start:]])}\n\n{needles.question}"


def _score(pattern: re.Pattern[str], items: Sequence[Item], answers: Sequence[str]) -> list[ItemScore]:
    """1 for an answer that names all requested values and no others."""
    scores = []
    for item, answer in zip(items, answers, strict=True):
        named, right = set(pattern.findall(answer)), set(item.target)
        scores.append(
            ItemScore(float(named == right), ", ".join(sorted(named)) or None, f"{len(named & right)} of {len(right)} found")
        )
    return scores
