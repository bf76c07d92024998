"""Speed by turns: child, autoregressive control and llama.cpp on the parent's weights answer the same tasks in turn.

llama.cpp lives in an environment of its own (`rival.py`); it reads the same prompts and writes as many tokens as the child did.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import unmask
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.engine.sampling_params import SamplingParams
from unmask.eval.mini5.tasks import mini5_tasks
from unmask.eval.runner import request_of
from unmask.models.weights.hub import embedded_gguf

RIVAL = Path(__file__).with_name("rival.py")
PAUSE_SECONDS = 1.0
Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Answer:
    """Tokens and seconds of an answer, those of its first forward alone, which reads the prompt, and our engine's forwards."""

    tokens: int
    seconds: float
    first_tokens: int
    first_seconds: float
    forwards: int = 0


def answer(model: LanguageModel, request: Request) -> Answer:
    """In our engine, nothing kept from one question to the next."""
    engine = model.engine(max_num_seqs=1, prefix_cache=False)
    tokens, forwards, marks = 0, 0, []
    started = time.perf_counter()
    for update in engine.stream(request):
        tokens += len(update.new_ids)
        marks.append((tokens, time.perf_counter() - started))
        forwards = update.completion.forwards if update.completion is not None else forwards
    return Answer(*marks[-1], *marks[0], forwards)


@contextmanager
def llama(python: str) -> Iterator[tuple[str, Callable[[Sequence[int | None], int], Answer]]]:
    """llama.cpp in another Python: its version, and what answers a prompt in so many tokens."""
    command = [python, str(RIVAL), str(embedded_gguf().path), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def ask(ids: Sequence[int | None], count: int) -> Answer:
            asked.write(json.dumps({"ids": ids, "tokens": count}) + "\n")
            asked.flush()
            return Answer(**json.loads(answers.readline()))

        yield json.loads(answers.readline()), ask
        asked.close()


def by_turns(child: str, control: str, python: str | None, decoding: SamplingParams, per_task: int) -> dict[str, Any]:
    """Tokens/s of each over the first test questions of every task, prefill included; the child's over each of the others'.

    A turn is a task: one after the other, each answers its first question unseen, then all of them on the clock. `ratio` is of
    the sums, `decoding` too, without what the first forwards took and gave; `median` (over all questions and by task), `p10`
    and `p90` are of the questions' own ratios, which a machine that is shared with others disturbs less.
    """
    # 8-bit where the CPU's kernels allow it; the control ignores how blocks are decoded.
    models = {name: unmask.load(path) for name, path in (("child", child), ("control", control))}
    taken: list[tuple[str, dict[str, Answer]]] = []
    with llama(python) if python is not None else _nobody() as (version, rival):
        for task in mini5_tasks():
            items = task.items("test", per_task)
            asked = {name: [request_of(model, item, decoding) for item in items] for name, model in models.items()}
            found = {name: _turn(partial(answer, model), asked[name]) for name, model in models.items()}
            if rival is not None:
                lengths = [max(1, each.tokens) for each in found["child"]]
                prompts = [request.ids for request in asked["control"]]
                found["llama.cpp"] = _turn(lambda both: rival(*both), list(zip(prompts, lengths, strict=True)))
            answers = [dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)]
            taken += [(task.name, each) for each in answers if all(one.tokens for one in each.values())]
    everything = [answers for _, answers in taken]
    over: dict[str, dict[str, Any]] = {}
    for name in everything[0].keys() - {"child"}:
        ratios = sorted(_ratio([answers], name) for answers in everything)
        low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.1, 0.9))
        by_task: dict[str, list[float]] = {}
        for task_name, pair in taken:
            by_task.setdefault(task_name, []).append(_ratio([pair], name))
        tasks = {task: statistics.median(each) for task, each in by_task.items()}
        spread = {"median": statistics.median(ratios), "p10": low, "p90": high}
        decoding_only = _decoding(everything, "child") / _decoding(everything, name)
        over[name] = {"ratio": _ratio(everything, name), "decoding": decoding_only, "tasks": tasks, **spread}
    speeds = {name: _speed(everything, name) for name in everything[0]}
    threads = torch.get_num_threads()
    return {
        "items": len(taken),
        "threads": threads,
        "tokens_per_second": speeds,
        "child_over": over,
        "llama_cpp_python": version,
    }


def compare_settings(child: str, settings: Sequence[SamplingParams], per_task: int) -> list[float]:
    """Tokens/s of each setting over the first validation questions of every task, every question answered in all in turn."""
    model = unmask.load(child)
    items = [item for task in mini5_tasks() for item in task.items("validation", per_task)]
    answer(model, request_of(model, items[0], settings[0]))
    taken: list[list[Answer]] = [[] for _ in settings]
    for number, item in enumerate(items):
        for turn in range(len(settings)):
            place = (turn + number) % len(settings)
            taken[place].append(answer(model, request_of(model, item, settings[place])))
    return [tokens_per_second(answers) for answers in taken]


def tokens_per_second(answers: Sequence[Answer]) -> float:
    """Of all answers together."""
    return sum(each.tokens for each in answers) / sum(each.seconds for each in answers)


def _speed(answers: Sequence[Mapping[str, Answer]], name: str) -> float:
    return tokens_per_second([each[name] for each in answers])


def _decoding(answers: Sequence[Mapping[str, Answer]], name: str) -> float:
    """Tokens/s after the first forward."""
    tokens = sum(each[name].tokens - each[name].first_tokens for each in answers)
    return tokens / sum(each[name].seconds - each[name].first_seconds for each in answers)


def _ratio(answers: Sequence[Mapping[str, Answer]], name: str) -> float:
    return _speed(answers, "child") / _speed(answers, name)


def _turn(way: Callable[[Asked], Answer], asked: Sequence[Asked]) -> list[Answer]:
    """All answers of one side, after a pause and an answer that does not count: others' idle threads spin, caches are cold."""
    time.sleep(PAUSE_SECONDS)
    way(asked[0])
    return [way(each) for each in asked]


@contextmanager
def _nobody() -> Iterator[tuple[None, None]]:
    yield None, None
