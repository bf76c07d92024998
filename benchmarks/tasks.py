"""Small tasks with known answers for speed benchmarks: a speed without a score beside it means nothing."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 40},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
_FIRST = ("Anna", "Boris", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Karin", "Liam")
_LAST = ("Berg", "Costa", "Dubois", "Evans", "Fischer", "Garcia", "Hansen", "Ito", "Jensen", "Kim", "Lopez", "Moreau")
_CITIES = ("Oslo", "Lima", "Paris", "Kyoto", "Berlin", "Cairo", "Boston", "Madrid", "Sydney", "Toronto", "Rome", "Delhi")

FACTS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("How many legs does a spider have?", "eight"),
    ("What is the largest ocean on Earth?", "Pacific"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"),
    ("What do bees make?", "honey"),
    ("Which planet is known as the Red Planet?", "Mars"),
)


@dataclass(frozen=True)
class Task:
    """A prompt, the form its answer must have (None: free text), and what is right."""

    prompt: str
    schema: dict[str, Any] | None
    expected: Any

    def score(self, text: str) -> float:
        """Share of it that is right: fields of the JSON object in it, or whether the word occurs."""
        if self.schema is None:
            return float(self.expected.lower() in text.lower())
        try:
            found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        except ValueError:
            return 0.0
        right: list[bool] = [found.get(key) == value for key, value in self.expected.items()]
        return sum(right) / len(right)


def extraction(count: int, seed: int = 0) -> list[Task]:
    """Sentences about a person, to be written as JSON."""
    rng, tasks = random.Random(seed), []
    for _ in range(count):
        person = {
            "name": f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
            "age": rng.randrange(18, 90),
            "city": rng.choice(_CITIES),
        }
        text = f"{person['name']} is {person['age']} years old and lives in {person['city']}."
        tasks.append(Task(f"{text} Write the name, age and city as JSON.", SCHEMA, person))
    return tasks


def facts(count: int) -> list[Task]:
    """Questions of one right word."""
    return [Task(question, None, answer) for question, answer in FACTS[:count]]
