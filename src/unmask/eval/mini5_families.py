"""Families of made-up questions: from a seed to a question, and which split a question belongs to.

Owns seeds, splits and the order of items. Knows no question, no scorer and no model.

Two things keep the splits apart. Each draws from its own range of seeds, and all ranges begin above every seed that
`data.generated` can use (31 bits, plus the number of an item). And a prompt belongs to the split that its hash names, whoever
draws it, so none occurs in two splits however many items are made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unmask.data.hashing import hash_text
from unmask.eval.task import Item, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_FIRST_SEED = 1 << 40
_SEEDS_PER_SPLIT = 1 << 36
_SPLIT_OF_HASH: tuple[Split, ...] = ("train", "train", "validation", "test")
_MAX_REJECTED = 2000  # in a row: the family has no more


@dataclass(frozen=True)
class Draw:
    """One question.

    Attributes:
        prompt: the user's message.
        target: what `mini5_answers` compares with.
        schema: the answer's form, where it is JSON.
        work: what leads to the answer, without the answer's own line; an item's target keeps it as "work".
    """

    prompt: str
    target: Mapping[str, Any]
    schema: Mapping[str, Any] | None = None
    work: str = ""


@dataclass(frozen=True)
class Family:
    """Questions of one kind.

    Attributes:
        name: of the kind, part of its items' ids.
        make: a function of the seed alone; None: no good question at this seed.
        max_new_tokens: most tokens of an answer.
        trainable: whether it has a train split; no for questions made from another benchmark's test set.
    """

    name: str
    make: Callable[[int], Draw | None]
    max_new_tokens: int = 96
    trainable: bool = True


def seeds(split: Split) -> range:
    """The seeds of a split, in the order in which every family draws from them."""
    first = _FIRST_SEED + SPLITS.index(split) * _SEEDS_PER_SPLIT
    return range(first, first + _SEEDS_PER_SPLIT)


def split_of(prompt: str) -> Split:
    """The one split in which a prompt may occur; half of all are for training."""
    return _SPLIT_OF_HASH[hash_text(prompt) % len(_SPLIT_OF_HASH)]


def seeded(make: Callable[[random.Random], Draw | None]) -> Callable[[int], Draw | None]:
    """A function of a random generator as a function of its seed."""
    return lambda seed: make(random.Random(seed))


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Different words, in the order in which they were drawn."""
    found: list[str] = []
    while len(found) < count:
        if (word := draw()) not in found:
            found.append(word)
    return found


def gym(name: str, seed: int, **config: Any) -> tuple[str, str]:
    """Question and answer of a reasoning-gym family at a seed."""
    import reasoning_gym

    entry = reasoning_gym.create_dataset(name, seed=seed, size=1, **config)[0]
    return entry["question"], entry["answer"]


def draws(family: Family, split: Split) -> Iterator[Draw]:
    """All questions of a family in a split, each once."""
    if split == "train" and not family.trainable:
        return
    seen: set[str] = set()
    rejected = 0
    for seed in seeds(split):
        draw = family.make(seed)
        if draw is None or split_of(draw.prompt) != split or draw.prompt in seen:
            rejected += 1
            if rejected == _MAX_REJECTED:
                return
            continue
        rejected = 0
        seen.add(draw.prompt)
        yield draw


def take_turns(
    dimension: str, families: Sequence[Family], split: Split, count: int, *, with_schema: bool = False
) -> list[Item]:
    """The first `count` items of a split, the families taking turns; `with_schema`: those that have one are bound by it."""
    items: list[Item] = []
    running = [(family, enumerate(draws(family, split))) for family in families]
    while running and len(items) < count:
        for entry in tuple(running):
            family, stream = entry
            index, draw = next(stream, (0, None))
            if draw is None:
                running.remove(entry)
                continue
            items.append(
                Item(
                    id=f"{dimension}/{family.name}/{split}/{index}",
                    prompt=draw.prompt,
                    target={**draw.target, **({"work": draw.work} if draw.work else {})},
                    max_new_tokens=family.max_new_tokens,
                    schema=draw.schema if with_schema else None,
                )
            )
    return items[:count]
