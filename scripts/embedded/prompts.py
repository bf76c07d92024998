"""Chat prompts for a small assistant: tens of thousands of distinct ones, of many kinds, the same for the same seed.

    python scripts/embedded/prompts.py 20 [--seed 0] [--kind code] [--texts out/free_texts/texts.jsonl]

Every kind is a grammar (`grammar/KIND.txt`, format: `prompts_grammar`) over word lists (`grammar/words_*.txt`), all written
for this project. With `--texts`, paragraphs of free texts (`free_texts.py`) are asked about too. A prompt shares no six words
in a row with the held-out prompts in benchmarks/everyday_prompts.jsonl, and belongs to one split by the hash of its longest
paragraph, so that requests about one text are in the same split. Owns kinds, shares and splits; the model is not its concern.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prompts_grammar import Alternative, Grammar, read_sections

GRAMMARS = Path(__file__).with_name("grammar")
HELD_OUT = Path(__file__).parents[2] / "benchmarks" / "everyday_prompts.jsonl"
SHARES: Mapping[str, int] = {
    "question": 14,
    "explain": 11,
    "rewrite": 11,
    "summary": 10,
    "plan": 11,
    "code": 8,
    "structured": 9,
    "turns": 9,
    "translate": 7,
    "talk": 5,
    "story": 8,
    "write": 5,
}
"""Kind -> percentage of the prompts."""
DOCUMENT_SHARE = 15
"""Percentage of requests about free texts, where there are any, beside the others."""
SPLITS = {"validation": 2, "test": 2}
"""Split -> percentage; the rest is `train`."""
NGRAM = 6
CASUAL_SHARE = 0.08
MAX_DUPLICATES = 2_000
"""So many draws in a row without a new prompt: the kind is exhausted."""
_TURN, _SYSTEM = " >> ", "system: "
_NO_TURN = "\ufdd0"
"""Stands for `_TURN` inside a free text; no text holds this noncharacter."""


@dataclass(frozen=True)
class Prompt:
    """What a user says, in one turn or several; the model's answers in between are not written yet.

    Attributes:
        kind: the grammar it comes from.
        turns: the user's turns.
        system: the system message, if there is one.
    """

    kind: str
    turns: tuple[str, ...]
    system: str | None = None

    @property
    def id(self) -> str:
        """16 hexadecimal digits that depend on all of the text."""
        return _digest(json.dumps([self.system, *self.turns]))

    @property
    def split(self) -> str:
        """`train`, `validation` or `test`."""
        paragraphs = [paragraph for turn in self.turns for paragraph in turn.split("\n\n")]
        return split_of(max(paragraphs, key=len))


def split_of(text: str) -> str:
    """The split a text belongs to, by its hash; letter case and white space do not count."""
    place = int(_digest(" ".join(text.lower().split())), 16) % 100
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    return "train"


class HeldOut:
    """Recognises texts that resemble the held-out prompts: equal ones, and those with `NGRAM` words in a row in common."""

    def __init__(self, texts: Iterable[str]) -> None:
        words = [_words(text) for text in texts]
        self._whole = set(words)
        self._ngrams = {ngram for each in words for ngram in ngrams(each, NGRAM)}

    @classmethod
    def read(cls, path: Path = HELD_OUT) -> HeldOut:
        """Of all messages in a file of held-out prompts."""
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return cls(message["content"] for record in records for message in record["messages"])

    def __contains__(self, text: str) -> bool:
        words = _words(text)
        return words in self._whole or not self._ngrams.isdisjoint(ngrams(words, NGRAM))


def ngrams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """All runs of `size` words."""
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def read_grammar(paragraphs: Sequence[str] = ()) -> Grammar:
    """The grammar of all kinds; `document` is left out where there are no paragraphs."""
    paths = sorted(GRAMMARS.glob("*.txt"))
    if not paragraphs:
        return Grammar(read_sections(path for path in paths if path.stem != "document"))
    coded = (text.replace(_TURN, _NO_TURN) for text in paragraphs)
    return Grammar({**read_sections(paths), "paragraph": [Alternative(text, is_literal=True) for text in coded]})


def draw(grammar: Grammar, kind: str, rng: random.Random) -> Prompt:
    """A random prompt of a kind."""
    text = grammar.expand(kind, rng)
    system, turns = None, [turn.replace(_NO_TURN, _TURN) for turn in text.split(_TURN)]
    if turns[0].startswith(_SYSTEM):
        system, turns = turns[0].removeprefix(_SYSTEM), turns[1:]
    return Prompt(kind, tuple(_casual(turn) if rng.random() < CASUAL_SHARE else _capital(turn) for turn in turns), system)


def prompts(count: int, seed: int, paragraphs: Sequence[str] = ()) -> list[Prompt]:
    """Distinct prompts in a mixed order.

    Args:
        count: how many.
        seed: of the draws and the order.
        paragraphs: of free texts, to ask about.

    Raises:
        ValueError: there are not that many of some kind.
    """
    grammar, held_out = read_grammar(paragraphs), HeldOut.read()
    shares = {**SHARES, "document": DOCUMENT_SHARE} if paragraphs else SHARES
    chosen: dict[str, Prompt] = {}
    for number, kind in enumerate(shares):
        rng = random.Random(f"{seed} {kind}")
        target = count * sum(list(shares.values())[: number + 1]) // sum(shares.values())
        duplicates = 0
        while len(chosen) < target:
            prompt = draw(grammar, kind, rng)
            if prompt.id in chosen or any(turn in held_out for turn in prompt.turns):
                duplicates += 1
                if duplicates > MAX_DUPLICATES:
                    raise ValueError(f"count is {count}; kind {kind} has fewer distinct prompts than that needs")
                continue
            duplicates = 0
            chosen[prompt.id] = prompt
    result = list(chosen.values())
    random.Random(seed).shuffle(result)
    return result


def _capital(text: str) -> str:
    """A single line with a capital; several may begin with code."""
    return text if "\n" in text else text[:1].upper() + text[1:]


def _casual(text: str) -> str:
    """Typed in a hurry: a short line without capitals or final punctuation."""
    if "\n" in text or len(text) > 120 or '"' in text or "{" in text:
        return text
    return text.lower().rstrip(".?")


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only show this kind")
    parser.add_argument("--texts", type=Path, help="paragraphs written by free_texts.py [default: none]")
    options = parser.parse_args()
    lines = [] if options.texts is None else options.texts.read_text(encoding="utf-8").splitlines()
    for prompt in prompts(options.count, options.seed, [json.loads(line)["text"] for line in lines]):
        if options.kind in (None, prompt.kind):
            turns = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
            messages = [*turns, *({"role": "user", "content": turn} for turn in prompt.turns)]
            print(json.dumps({"kind": prompt.kind, "split": prompt.split, "messages": messages}, ensure_ascii=False))


if __name__ == "__main__":
    main()
