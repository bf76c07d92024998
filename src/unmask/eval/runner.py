"""Running tasks: answers through the engine, a score and a speed for each, all of it on disk as it comes.

Owns the folder of a run: `samples.jsonl`, one answer a line, from which a killed run goes on, and `results.json`. Knows tasks
by their records only.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress, islice
from pathlib import Path
from typing import Any

from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.errors import ConfigError
from unmask.eval.provenance import about_model, environment
from unmask.eval.task import Item, Split, Task
from unmask.files import atomic_write_json

FORMAT = 1
SCORED_TOGETHER = 16
TOO_LONG = "too long"
"""`finish_reason` of an item that the context has no room for."""
OnProgress = Callable[[str, int, int], None]
"""Task, items done, items in all."""


@dataclass(frozen=True)
class Sample:
    """One answered item. `seconds` are those of its own forwards, waiting left out."""

    task: str
    id: str
    prompt: str
    target: Any
    answer: str
    extracted: str | None
    score: float
    detail: str | None
    finish_reason: str
    prompt_tokens: int
    tokens: int
    forwards: int
    seconds: float


@dataclass(frozen=True)
class Settings:
    """What answers and scores depend on.

    Attributes:
        split: which items.
        decoding: options of `LanguageModel.request` for every item.
        batch: answers decoded together; speeds are those of one request alone only where this is 1.
    """

    split: Split = "test"
    decoding: Mapping[str, Any] | None = None
    batch: int = 1


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[Task],
    folder: Path,
    *,
    count: Callable[[Task], int],
    settings: Settings | None = None,
    resume: bool = False,
    on_progress: OnProgress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Answer and score the first items of every task.

    Args:
        model: with a tokenizer.
        tasks: by distinct names.
        folder: of the run; made.
        count: how many items of a task, at most.
        settings: split, decoding, batch.
        resume: go on with what is in the folder; without it the folder must hold no run.
        on_progress: told after every few answers.

    Returns:
        What `results.json` holds.

    Raises:
        ConfigError: a run is there and `resume` is not given, or it was made with other settings.
        RequestError: an item that the model cannot be asked.
    """
    settings = settings if settings is not None else Settings()
    head = {
        "format": FORMAT,
        "model": about_model(model),
        "settings": {**asdict(settings), "decoding": dict(settings.decoding or {})},
        "tasks": {task.name: task.version for task in tasks},
    }
    path = folder / "samples.jsonl"
    samples = _open(path, head, resume=resume)
    known = {(sample.task, sample.id) for sample in samples}
    with path.open("a", encoding="utf-8") as file:
        for task in tasks:
            items = task.items(settings.split, count(task))
            left = [item for item in items if (task.name, item.id) not in known]
            done = len(items) - len(left)
            on_progress(task.name, done, len(items))
            for some in _chunks(left, max(SCORED_TOGETHER, settings.batch)):
                new = _answer(model, task, some, settings)
                file.writelines(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in new)
                file.flush()
                samples += new
                done += len(new)
                on_progress(task.name, done, len(items))
    wanted = {task.name: {item.id for item in task.items(settings.split, count(task))} for task in tasks}
    samples = [sample for sample in samples if sample.id in wanted.get(sample.task, ())]
    results = {**head, "tasks": summarise(tasks, samples), "environment": environment()}
    atomic_write_json(folder / "results.json", results)
    return results


def load_results(folder: Path) -> dict[str, Any]:
    """What `results.json` of a run holds.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no finished run ({error}); run unmask eval there with --resume") from error
    return results


def load_samples(folder: Path) -> list[Sample]:
    """The answers of a run.

    Raises:
        ConfigError: there is none.
    """
    path = folder / "samples.jsonl"
    if not path.exists():
        raise ConfigError(f"{folder} holds no run: there is no samples.jsonl; name the --out folder of unmask eval")
    return _read(path)[1]


def summarise(tasks: Sequence[Task], samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Score and speed of every task; `limited` says that there are more items than were asked for."""
    summary = {}
    for task in tasks:
        own = [sample for sample in samples if sample.task == task.name]
        scores = [sample.score for sample in own]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        summary[task.name] = {
            "dimension": task.dimension,
            "metric": task.metric,
            "version": task.version,
            "licence": task.licence,
            "source": task.source,
            "score": statistics.fmean(scores) if scores else None,
            "standard_error": spread / math.sqrt(len(scores)) if scores else None,
            "items": len(own),
            "too_long": sum(sample.finish_reason == TOO_LONG for sample in own),
            "size": task.size,
            "limited": task.size is None or len(own) < task.size,
            "speed": speed(own),
        }
    return summary


def speed(samples: Sequence[Sample]) -> dict[str, Any]:
    """Forwards, tokens per forward (every forward counted) and tokens/s, with their spread over items."""
    rates = sorted(sample.tokens / sample.seconds for sample in samples if sample.seconds > 0)
    per_forward = sorted(sample.tokens / max(sample.forwards, 1) for sample in samples)
    tokens, forwards = (sum(getattr(sample, name) for sample in samples) for name in ("tokens", "forwards"))
    return {
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / max(forwards, 1),
        "tokens_per_forward_spread": _spread(per_forward),
        "tokens_per_second": tokens / max(sum(sample.seconds for sample in samples), 1e-9),
        "tokens_per_second_spread": _spread(rates),
    }


def _spread(ordered: Sequence[float]) -> dict[str, float] | None:
    if not ordered:
        return None
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}


def _answer(model: LanguageModel, task: Task, items: Sequence[Item], settings: Settings) -> list[Sample]:
    """Answers and scores of items; one that the context has no room for is wrong, unasked."""
    tokenizer, room = model.tokenizer, model.config.max_positions
    assert tokenizer is not None, "request_of has refused a model without one"
    every = [(item, request_of(model, item, settings.decoding or {})) for item in items]
    fits = [len(request.ids) + request.params.max_new_tokens <= room for _, request in every]
    refused = [_refused(task, *pair, room) for pair, fit in zip(every, fits, strict=True) if not fit]
    asked = list(compress(every, fits))
    items, requests = [item for item, _ in asked], [request for _, request in asked]
    # One stream reads every prompt anew, whatever the size of a page would let it share: its tokens/s are compared.
    completions = model.engine(max_num_seqs=settings.batch, prefix_cache=settings.batch > 1).run(requests)
    answers = [
        item.answer_prefix + (tokenizer.decode(each.ids) if each.text is None else each.text)
        for item, each in zip(items, completions, strict=True)
    ]
    return refused + [
        Sample(
            task=task.name,
            id=item.id,
            prompt=item.prompt,
            target=item.target,
            answer=answer,
            extracted=score.extracted,
            score=score.value,
            detail=score.detail,
            finish_reason=completion.finish_reason,
            prompt_tokens=len(request.ids),
            tokens=len(completion.ids),
            forwards=completion.forwards,
            seconds=completion.costs.busy_seconds,
        )
        for item, request, completion, answer, score in zip(
            items, requests, completions, answers, task.score(items, answers), strict=True
        )
    ]


def _refused(task: Task, item: Item, request: Request, room: int) -> Sample:
    most = request.params.max_new_tokens
    why = f"not asked: {len(request.ids)} tokens and an answer of up to {most} exceed the context of {room}"
    return Sample(task.name, item.id, item.prompt, item.target, "", None, 0.0, why, TOO_LONG, len(request.ids), 0, 0, 0.0)


def request_of(model: LanguageModel, item: Item, decoding: Mapping[str, Any]) -> Request:
    """What the engine is asked for an item.

    Raises:
        RequestError: no tokenizer or chat template.
    """
    if item.raw or item.system is None:
        ids = model.encode_prompt(item.prompt, chat=False if item.raw else None)
    else:
        ids = model.encode_chat([{"role": "system", "content": item.system}, {"role": "user", "content": item.prompt}])
    if item.answer_prefix and model.tokenizer is not None:
        ids = [*ids, *model.tokenizer.encode(item.answer_prefix)]
    return model.request(
        ids, max_new_tokens=item.max_new_tokens, stop=item.stop, json_schema=item.schema, **{"seed": 0, **decoding}
    )


def _open(path: Path, head: Mapping[str, Any], *, resume: bool) -> list[Sample]:
    """What the run has done so far; its first line is written if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        path.write_text(json.dumps({"run": head}) + "\n", encoding="utf-8")
        return []
    if not resume:
        raise ConfigError(f"{path.parent} holds a run already; add --resume to go on with it, or use another --out")
    begun, samples = _read(path)
    same = json.loads(json.dumps(head))
    for name, value in begun.items():
        # More tasks may join a run, but none may change.
        mine = {key: same[name].get(key, old) for key, old in value.items()} if name == "tasks" else same.get(name)
        if value != mine:
            raise ConfigError(f"{path.parent} was begun with {name} {value}, now it is {mine}; use another --out")
    lines = [json.dumps({"run": same})] + [json.dumps(asdict(sample), ensure_ascii=False) for sample in samples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return samples


def _read(path: Path) -> tuple[dict[str, Any], list[Sample]]:
    """The head and the samples of a run; a last line that was cut off is left out.

    Raises:
        ConfigError: the file is not such a run.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        head = json.loads(lines[0])["run"]
        parsed = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                parsed.append(Sample(**json.loads(line)))
            except ValueError:
                if number < len(lines):
                    raise
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"{path} is damaged ({error}); use another --out") from error
    return head, parsed


def _chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some
