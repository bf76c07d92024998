"""Question generators: from a seed to a question, and the split to which a question belongs.

Owns seeds, splits and the order of items. Knows no question, no scorer and no model.

Two rules keep the splits apart. Each split has its own range of seeds, and all ranges begin above every seed that
`data.generated` can use (31 bits, plus the index of an item). And the hash of a prompt decides its split, so that no prompt
occurs in two splits, however many items are made.
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
_MAX_REJECTED = 2000  # seeds in a row: the generator is exhausted


@dataclass(frozen=True)
class Question:
    """A generated question.

    Attributes:
        prompt: the user's message.
        target: the right answer, as `scoring` compares it.
        schema: JSON schema of the answer, where that is JSON.
        work: the steps to the answer, without the line that states it; kept in an item's target as "work".
    """

    prompt: str
    target: Mapping[str, Any]
    schema: Mapping[str, Any] | None = None
    work: str = ""


@dataclass(frozen=True)
class Generator:
    """A generator of questions of one kind.

    Attributes:
        name: part of its items' ids.
        make: a function of the seed alone; None where the seed gives no good question.
        max_new_tokens: most tokens of an answer.
        trainable: whether it has a train split; False for questions made from another benchmark's test set.
    """

    name: str
    make: Callable[[int], Question | None]
    max_new_tokens: int = 96
    trainable: bool = True


def seeds(split: Split) -> range:
    """The seeds of a split, in the order in which every generator uses them."""
    first = _FIRST_SEED + SPLITS.index(split) * _SEEDS_PER_SPLIT
    return range(first, first + _SEEDS_PER_SPLIT)


def split_of(prompt: str) -> Split:
    """The only split in which a prompt may occur; half of all prompts are for training."""
    return _SPLIT_OF_HASH[hash_text(prompt) % len(_SPLIT_OF_HASH)]


def seeded(make: Callable[[random.Random], Question | None]) -> Callable[[int], Question | None]:
    """A function of a seed, from a function of a random number generator."""
    return lambda seed: make(random.Random(seed))


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """`count` different words, in the order in which `draw` gives them."""
    words: list[str] = []
    while len(words) < count:
        if (word := draw()) not in words:
            words.append(word)
    return words


def gym(name: str, seed: int, **config: Any) -> tuple[str, str]:
    """Question and answer of a reasoning-gym data set at a seed."""
    import reasoning_gym

    entry = reasoning_gym.create_dataset(name, seed=seed, size=1, **config)[0]
    return entry["question"], entry["answer"]


def questions(generator: Generator, split: Split) -> Iterator[Question]:
    """All questions of a generator in a split, each once."""
    if split == "train" and not generator.trainable:
        return
    seen: set[str] = set()
    rejected = 0
    for seed in seeds(split):
        question = generator.make(seed)
        if question is None or split_of(question.prompt) != split or question.prompt in seen:
            rejected += 1
            if rejected == _MAX_REJECTED:
                return
            continue
        rejected = 0
        seen.add(question.prompt)
        yield question


def take_turns(
    dimension: str, generators: Sequence[Generator], split: Split, count: int, *, with_schema: bool = False
) -> list[Item]:
    """The first `count` items of a split, the generators in turn.

    Args:
        dimension: first part of the items' ids.
        generators: one that is exhausted leaves its turns to the others.
        split: whose questions.
        count: most items.
        with_schema: constrain answers to the questions' JSON schemas.
    """
    items: list[Item] = []
    running = [(generator, enumerate(questions(generator, split))) for generator in generators]
    while running and len(items) < count:
        for entry in tuple(running):
            generator, stream = entry
            index, question = next(stream, (0, None))
            if question is None:
                running.remove(entry)
                continue
            items.append(
                Item(
                    id=f"{dimension}/{generator.name}/{split}/{index}",
                    prompt=question.prompt,
                    target={**question.target, **({"work": question.work} if question.work else {})},
                    max_new_tokens=generator.max_new_tokens,
                    schema=question.schema if with_schema else None,
                )
            )
    return items[:count]
