"""Speed by turns: one model decodes the same questions in several ways, one question after the other in all of them in turn."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import unmask
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.engine.sampling_params import SamplingParams
from unmask.eval.mini5.tasks import mini5_tasks
from unmask.eval.runner import request_of


@dataclass(frozen=True)
class Answer:
    """Tokens, forwards and seconds of an answer, its prompt included."""

    tokens: int
    forwards: int
    seconds: float


def answer(model: LanguageModel, request: Request) -> Answer:
    """In an engine that has seen no question before."""
    engine = model.engine(max_num_seqs=1, prefix_cache=False)
    started = time.perf_counter()
    (completion,) = engine.run([request])
    return Answer(len(completion.ids), completion.forwards, time.perf_counter() - started)


def by_turns(name: str, ways: Mapping[str, SamplingParams], per_task: int) -> dict[str, list[Answer]]:
    """Each way's answers to the first test questions of every task; before the first, each answers once unseen."""
    model = unmask.load(name)
    items = [item for task in mini5_tasks() for item in task.items("test", per_task)]
    for decoding in ways.values():
        answer(model, request_of(model, items[0], decoding))
    taken: dict[str, list[Answer]] = {way: [] for way in ways}
    for number, item in enumerate(items):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for way in order:
            taken[way].append(answer(model, request_of(model, item, ways[way])))
    return taken


def speed(answer_: Answer) -> float:
    """Tokens/s."""
    return answer_.tokens / answer_.seconds
