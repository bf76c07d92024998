"""A random text grammar: sections of alternatives that refer to each other.

Owns the file format and its expansion. Knows nothing of prompts, kinds or models.

    [section]
    one alternative per line
    %3 an alternative that is drawn three times as often
    {other} is replaced by an alternative of [other], expanded; {other:1} by the same one wherever it stands in the text
    {^other} begins with a capital; {a other} has "a" or "an" before it; {3-12} is a whole number
    a line break is written \\n
    # a comment
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_REFERENCE = re.compile(
    r"\{(?P<capital>\^)?(?P<article>a )?(?:(?P<low>\d+)-(?P<high>\d+)|(?P<name>[a-z_]+)(?::(?P<label>\w+))?)\}"
)
_HEADER = re.compile(r"\[(\w+)\]")
_WEIGHT = re.compile(r"%(\d+) ")
_ATTEMPTS = 4
_VOWEL_SOUND = re.compile(r"(?!one|uni|use|euro)[aeiou]|hour|honest|heir|8|11\b|18\b", re.IGNORECASE)


@dataclass(frozen=True)
class Alternative:
    """One line of a section.

    Attributes:
        text: references among it.
        weight: how much more often than one of weight 1 it is drawn.
        is_literal: what looks like a reference is text.
    """

    text: str
    weight: int = 1
    is_literal: bool = False

    @property
    def references(self) -> Iterator[re.Match[str]]:
        """All references in it."""
        return iter(()) if self.is_literal else _REFERENCE.finditer(self.text)


@dataclass(frozen=True)
class Grammar:
    """Sections of alternatives.

    Raises:
        ValueError: an alternative refers to a section that is missing.
    """

    sections: Mapping[str, Sequence[Alternative]]

    def __post_init__(self) -> None:
        for name, alternatives in self.sections.items():
            for alternative in alternatives:
                for match in alternative.references:
                    if match["name"] is not None and match["name"] not in self.sections:
                        raise ValueError(f"section {name} refers to {match['name']}, which is missing; add the section")

    @cached_property
    def _weights(self) -> dict[str, list[int]]:
        return {name: [each.weight for each in alternatives] for name, alternatives in self.sections.items()}

    def expand(self, section: str, rng: random.Random) -> str:
        """A random text of `section`; the same for the same state of `rng`."""
        return self._expand(section, rng, {})

    def _expand(self, section: str, rng: random.Random, labelled: dict[tuple[str, str], str]) -> str:
        used: set[str] = set()

        def replacement(match: re.Match[str]) -> str:
            if match["name"] is None:
                text = str(rng.randint(int(match["low"]), int(match["high"])))
            elif match["label"] is None:
                # Two references of a line are rarely meant to be the same thing.
                for _ in range(_ATTEMPTS):
                    text = self._expand(match["name"], rng, labelled)
                    if text not in used:
                        break
                used.add(text)
            else:
                key = (match["name"], match["label"])
                if key not in labelled:
                    labelled[key] = self._expand(match["name"], rng, labelled)
                text = labelled[key]
            if match["article"]:
                text = f"{'an' if _VOWEL_SOUND.match(text) else 'a'} {text}"
            return text[:1].upper() + text[1:] if match["capital"] else text

        (alternative,) = rng.choices(self.sections[section], self._weights[section])
        return alternative.text if alternative.is_literal else _REFERENCE.sub(replacement, alternative.text)

    def num_texts(self, section: str) -> int:
        """How many ways there are to expand `section`, every reference counted as drawn anew."""
        counts: dict[str, int] = {}

        def count(name: str) -> int:
            if name not in counts:
                counts[name] = sum(map(ways, self.sections[name]))
            return counts[name]

        def ways(alternative: Alternative) -> int:
            product, labels = 1, set()
            for match in alternative.references:
                if match["label"] is not None and (match["name"], match["label"]) in labels:
                    continue
                labels.add((match["name"], match["label"]))
                product *= count(match["name"]) if match["name"] else int(match["high"]) - int(match["low"]) + 1
            return product

        return count(section)


def read_sections(paths: Iterable[Path]) -> dict[str, list[Alternative]]:
    """All sections of some files.

    Raises:
        ValueError: a line before the first section, or a section without alternatives or defined twice.
    """
    sections: dict[str, list[Alternative]] = {}
    for path in paths:
        section: str | None = None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            if header := _HEADER.fullmatch(line.strip()):
                section = header[1]
                if section in sections:
                    raise ValueError(f"{path.name} line {number}: section {section} is defined twice; rename one")
                sections[section] = []
            elif section is None:
                raise ValueError(f"{path.name} line {number}: text before the first [section]; move it into one")
            else:
                weight = _WEIGHT.match(line)
                text = line[weight.end() :] if weight else line
                sections[section].append(Alternative(text.replace("\\n", "\n"), int(weight[1]) if weight else 1))
    empty = [name for name, alternatives in sections.items() if not alternatives]
    if empty:
        raise ValueError(f"section {empty[0]} has 0 alternatives; add one or remove it")
    return sections
