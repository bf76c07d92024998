"""Task runner: answers through the engine, with a score and a cost for each, written to disk as they come.

Owns the folder of a run: `samples.jsonl`, a line for each answer, from which a killed run is resumed, and `results.json`.
Knows tasks by their records only.
"""

from __future__ import annotations

import json
import math
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError
from unmask.eval.provenance import about_model, check_same_run, environment
from unmask.eval.speed import Cost, speed_of
from unmask.eval.task import Item, Split, Task
from unmask.files import atomic_write, atomic_write_json, bytes_writer

FORMAT = 1
SCORED_TOGETHER = 16
_FIXED = ("model", "settings", "tasks")
"""What a run is continued with, in its first line."""
_REPORTED: Mapping[str, Set[str]] = {
    "model": {"name", "weights", "dtype", "quantize", "expert_capacity", "diffusion"},
    "settings": {"decoding", "batch"},
    "tasks": set(),
    "environment": {"packages", "cpu", "threads"},
}
"""What reports take from `results.json`."""
TOO_LONG = "too long"
"""`finish_reason` of an item that does not fit the model's context."""
OnProgress = Callable[[str, int, int], None]
"""Called with the task's name, the items done and all items."""


@dataclass(frozen=True)
class EvalSample:
    """One answered item. `seconds` are those of its own forwards, without waiting."""

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
class EvalSettings:
    """Settings that answers and scores depend on.

    Attributes:
        split: of the items.
        decoding: decoding options of every item.
        batch: answers decoded together; speeds are those of a single request only where this is 1.
    """

    split: Split = "test"
    decoding: SamplingParams = field(default_factory=SamplingParams)
    batch: int = 1


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[Task],
    folder: Path,
    *,
    count: Callable[[Task], int],
    settings: EvalSettings = EvalSettings(),
    resume: bool = False,
    on_progress: OnProgress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Answer and score the first items of every task.

    Args:
        model: with a tokenizer.
        tasks: by distinct names.
        folder: of the run; created.
        count: most items of a task.
        settings: split, decoding, batch.
        resume: continue the run in the folder; without it the folder must hold no run.
        on_progress: called after every few answers.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: the folder holds a run and `resume` is not set, or the run was made with other settings.
        RequestError: the model cannot be asked an item.
    """
    head = {
        "format": FORMAT,
        "model": about_model(model),
        "settings": {**asdict(settings), "decoding": settings.decoding.given()},
        "tasks": {task.name: task.version for task in tasks},
    }
    path = folder / "samples.jsonl"
    samples = _open(path, head, resume=resume)
    known = {(sample.task, sample.id) for sample in samples}
    with path.open("a", encoding="utf-8") as file:
        for task in tasks:
            items = task.items(settings.split, count(task))
            pending = [item for item in items if (task.name, item.id) not in known]
            done = len(items) - len(pending)
            on_progress(task.name, done, len(items))
            size = max(SCORED_TOGETHER, settings.batch)
            for start in range(0, len(pending), size):
                new = _answer(model, task, pending[start : start + size], settings)
                file.writelines(map(_line, new))
                file.flush()
                samples += new
                done += len(new)
                on_progress(task.name, done, len(items))
    ids = {task.name: {item.id for item in task.items(settings.split, count(task))} for task in tasks}
    samples = [sample for sample in samples if sample.id in ids.get(sample.task, ())]
    results = {**head, "tasks": summarise(tasks, samples), "environment": environment()}
    atomic_write_json(folder / "results.json", results)
    return results


def load_results(folder: Path) -> dict[str, Any]:
    """The content of a run's `results.json`.

    Raises:
        ConfigError: the file is absent or damaged.
    """
    try:
        results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no finished run ({error}); resume the run there") from error
    for section, names in _REPORTED.items():
        values = results.get(section) if isinstance(results, dict) else None
        if not isinstance(values, dict) or not names <= values.keys():
            raise ConfigError(f"{folder / 'results.json'} is damaged, or of another version: its {section}; run it again")
    return results


def load_samples(folder: Path) -> list[EvalSample]:
    """The answers of a run.

    Raises:
        ConfigError: the folder holds no run.
    """
    return _read(folder / "samples.jsonl")[1]


def summarise(tasks: Sequence[Task], samples: Sequence[EvalSample]) -> dict[str, dict[str, Any]]:
    """Score and speed of every task; `limited`: the task has more items than were asked."""
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
            "speed": speed_of([Cost(sample.tokens, sample.forwards, sample.seconds) for sample in own]),
        }
    return summary


def _answer(model: LanguageModel, task: Task, items: Sequence[Item], settings: EvalSettings) -> list[EvalSample]:
    """Answers and scores of items; an item that does not fit the context counts as wrong without being asked."""
    room = model.config.max_positions
    too_long, fitting = [], []
    for item in items:
        request = request_of(model, item, settings.decoding)
        count, most = len(request.ids), request.params.max_new_tokens
        if count + most <= room:
            fitting.append((item, request))
            continue
        detail = f"not asked: {count} tokens and an answer of up to {most} exceed the context of {room}"
        sample = EvalSample(task.name, item.id, item.prompt, item.target, "", None, 0.0, detail, TOO_LONG, count, 0, 0, 0.0)
        too_long.append(sample)
    items, requests = [item for item, _ in fitting], [request for _, request in fitting]
    # A single stream prefills every prompt in full, so that its tokens/s do not depend on what prompts have in common.
    completions = model.engine(max_num_seqs=settings.batch, prefix_cache=settings.batch > 1).run(requests)
    assert all(each.text is not None for each in completions), "an engine with a tokenizer gives texts"
    answers = [f"{item.answer_prefix}{each.text}" for item, each in zip(items, completions, strict=True)]
    return too_long + [
        EvalSample(
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


def request_of(model: LanguageModel, item: Item, decoding: SamplingParams) -> Request:
    """The engine's request for an item.

    Raises:
        RequestError: the model has no tokenizer or chat template.
    """
    if item.raw or item.system is None:
        ids = model.encode_prompt(item.prompt, chat=False if item.raw else None)
    else:
        ids = model.encode_chat([{"role": "system", "content": item.system}, {"role": "user", "content": item.prompt}])
    if item.answer_prefix and model.tokenizer is not None:
        ids = [*ids, *model.tokenizer.encode(item.answer_prefix, after=ids)]
    # Sampled answers to items of one prompt differ, and do not depend on which items are asked together.
    number = zlib.crc32(item.id.encode())
    limits: dict[str, Any] = {"max_new_tokens": item.max_new_tokens, "stop": item.stop, "json_schema": item.schema}
    return model.request(ids, decoding, sample=number, **limits)


def _open(path: Path, head: Mapping[str, Any], *, resume: bool) -> list[EvalSample]:
    """The samples of a run so far; writes the first line of a new run."""
    samples: list[EvalSample] = []
    if path.exists() and path.read_bytes().strip():
        if not resume:
            raise ConfigError(f"{path.parent} holds a run already; set resume to continue it, or use another folder")
        old_head, samples = _read(path)
        if old_head.get("format") != FORMAT:
            raise ConfigError(f"{path} has format {old_head.get('format')!r}, and {FORMAT} is read; use another folder")
        tasks = old_head.get("tasks")
        tasks = tasks if isinstance(tasks, dict) else {}
        # More tasks may join a run, but none may change.
        head = {**head, "tasks": {**tasks, **head["tasks"]}}
        check_same_run(path.parent, {**old_head, "tasks": {**head["tasks"], **tasks}}, {k: head[k] for k in _FIXED})
    lines = [json.dumps({"run": head}) + "\n", *map(_line, samples)]
    atomic_write(path, bytes_writer("".join(lines).encode()))
    return samples


def _line(sample: EvalSample) -> str:
    return json.dumps(asdict(sample), ensure_ascii=False) + "\n"


def _read(path: Path) -> tuple[dict[str, Any], list[EvalSample]]:
    """Head and samples of a run; a last line that was cut off is dropped.

    Raises:
        ConfigError: the file is absent or damaged.
    """
    try:
        # Not `splitlines`: a line may hold other separators. Behind the last end of line stands what was cut off, or nothing.
        lines = path.read_bytes().split(b"\n")
        head = dict(json.loads(lines[0])["run"])
        parsed = []
        for number, line in enumerate(lines[1:], start=2):
            try:
                parsed.append(EvalSample(**json.loads(line)))
            except ValueError:
                if number < len(lines):
                    raise
    except OSError as error:
        raise ConfigError(f"{path.parent} holds no run ({error}); give the folder of an evaluation") from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"{path} is damaged ({error}); use another folder") from error
    return head, parsed
