"""Shared parts of `eval`, `compare` and `sweep`: options, selection of tasks, opening a model, progress bars, result tables.

Owns the names of suites and tasks. Knows no statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from unmask.cli.console import is_live
from unmask.cli.decoding import load
from unmask.cli.interrupt import interruptible
from unmask.cli.tables import print_table
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.engine.llm import LanguageModel
    from unmask.eval.registry import Suite
    from unmask.eval.runner import EvalSettings
    from unmask.eval.suite import Selection
    from unmask.eval.task import Task

MINI5, LLADA2 = "mini-5", "llada2-47"
DEFAULT_COUNT = 50
"""Items of a task that can make any number."""
_ABOUT = "tasks, or the reason for not running it"
_Number = TypeVar("_Number", int, float)

SuiteName = Annotated[
    str | None, typer.Option(help=f"{MINI5} (no download), {LLADA2} (the report's 47), or a file of a suite.")
]
TaskNames = Annotated[
    str | None, typer.Option(help="Names, separated by commas: our own (see `unmask eval --list`) or lm-eval's.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Items per task. [default: all; 50 of a generated task]")]
SplitName = Annotated[
    Literal["test", "validation", "train"], typer.Option("--split", help="Only our own tasks have the last two.")
]
Yarn = Annotated[float | None, typer.Option(help="Extend the context by this factor (YaRN).", rich_help_panel="Model")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Let lm-eval's tasks run model-written code without a sandbox.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Batch = Annotated[int, typer.Option(min=1, help="Answers decoded together; with 1, tokens/s are those of a single stream.")]


def open_suite(name: str | None) -> Suite | None:
    """The suite of a report, by its name or from a file; None for mini-5 and where no suite is given.

    Raises:
        ConfigError: there is no such suite, or its file breaks a rule.
    """
    from unmask.eval.registry import load_suite

    if name in (None, MINI5):
        return None
    if name != LLADA2 and not Path(str(name)).exists():
        raise ConfigError(f"--suite is {name!r}; use {MINI5}, {LLADA2} or a YAML file")
    return load_suite(str(name))


def select_tasks(suite: str | None, names: str | None, *, required: bool = True) -> Selection:
    """The tasks of `--suite mini-5` and of `--tasks`, where "bfcl-offline" stands for every "bfcl-offline/...".

    Raises:
        ConfigError: nothing is selected though `required`, or the suite is unknown.
    """
    from unmask.eval.mini5.tasks import mini5_tasks
    from unmask.eval.suite import Selection, own_tasks

    if suite not in (None, MINI5):
        raise ConfigError(f"suite {suite!r} is not known here; use {MINI5}, or name tasks with --tasks")
    own, known = list(mini5_tasks()) if suite == MINI5 else [], own_tasks()
    harness = []
    for name in (part.strip() for part in (names or "").split(",")):
        group = [task for task in known.values() if name and name in (task.name, task.name.partition("/")[0])]
        own += group
        if name and not group:
            harness.append(name)
    if required and not own and not harness:
        raise ConfigError(f"no tasks are selected; give --suite {MINI5} or --tasks, and see unmask eval --list")
    return Selection(tuple({task.name: task for task in own}.values()), tuple(dict.fromkeys(harness)))


def check_models(*names: str) -> None:
    """Raise CheckpointError where one of these models is not there, before work on another one begins."""
    from unmask.cli.info import find_config

    for name in names:
        find_config(name)


def open_model(
    name: str, *, dtype: str, device: str, quantize: str, yarn: float | None = None, expert_capacity: int | None = None
) -> LanguageModel:
    """A model ready to be timed: weights quantised, one token decoded; `yarn` extends its context by that factor.

    Raises:
        ConfigError: it has no tokenizer, or its context cannot be extended.
    """
    import unmask
    from unmask.engine.quantization import for_dtype
    from unmask.models.arch.yarn import stretch_context

    model = load(name, dtype, device, quantize if yarn is None else "none", expert_capacity)
    if yarn is not None:
        extended = stretch_context(model.transformer, yarn)
        model = unmask.LanguageModel(
            extended, model.tokenizer, name=f"{name} (YaRN {yarn:g})", quantize=for_dtype(quantize, dtype),
            expert_capacity=expert_capacity,
        )  # fmt: skip
    if model.tokenizer is None:
        raise ConfigError(f"model {name} has no tokenizer; add tokenizer.json to its folder to evaluate it")
    model.generate_ids([model.tokenizer.eos_id], max_new_tokens=1)
    return model


def needles(lengths: str | None, model: LanguageModel) -> tuple[Task, ...]:
    """Needle tasks for context lengths separated by commas; none for None.

    Raises:
        ConfigError: they are not numbers, or a length exceeds the model's context.
    """
    if lengths is None:
        return ()
    from unmask.eval.needle import needle_tasks

    targets = numbers(lengths, "--needle", int)
    room = model.config.max_positions
    if min(targets) < 1:
        raise ConfigError(f"--needle is {min(targets)}; a context has at least a token, and hundreds for question and answer")
    if max(targets) > room:
        raise ConfigError(f"--needle {max(targets)} is more than the context of {room} tokens; extend it with --yarn")
    return needle_tasks(targets, lambda text: len(model.encode_prompt(text)))


def numbers(text: str, option: str, kind: type[_Number]) -> list[_Number]:
    """Numbers separated by commas.

    Raises:
        ConfigError: something else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; give numbers separated by commas") from error


@contextmanager
def showing_tasks(console: Console, going_on: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback (task, items done, all items): bars with the remaining time in a terminal, lines elsewhere.

    Ctrl-C ends the command; `going_on` as of `interruptible`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with interruptible(going_on), Progress(*columns, console=console, disable=not is_live(console)) as progress:
        bars: dict[str, Any] = {}

        def on_progress(task: str, done: int, total: int) -> None:
            if progress.disable and done == total:
                console.print(f"{task}: {done} items", soft_wrap=True)
            if task not in bars:
                bars[task] = progress.add_task(task, total=total)
            progress.update(bars[task], completed=done, total=total)

        yield on_progress


def answer(
    console: Console,
    model: LanguageModel,
    tasks: Sequence[Task],
    folder: Path,
    limit: int | None,
    settings: EvalSettings,
) -> dict[str, Any]:
    """Run tasks in a folder, or resume the run there; the content of `results.json`."""
    from unmask.eval.runner import run_tasks

    count = partial(count_for, limit)
    console.print(f"{model.name}  {folder}", soft_wrap=True)
    with showing_tasks(console, "the same command") as on_progress:
        return run_tasks(model, tasks, folder, count=count, settings=settings, resume=True, on_progress=on_progress)


def count_for(limit: int | None, task: Task) -> int:
    """Number of items of a task to ask."""
    return limit if limit is not None else task.size if task.size is not None else DEFAULT_COUNT


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """Print score and speed of every task, and the plain mean over tasks."""
    rows: list[tuple[str, ...]] = []
    tasks: Mapping[str, Any] = results["tasks"]
    for name, task in tasks.items():
        speed, of = task["speed"], "" if not task["limited"] or task["size"] is None else f" of {task['size']}"
        spread = speed["tokens_per_second_spread"]
        rates = "" if spread is None else f"{speed['tokens_per_second']:.0f} ({spread['p10']:.0f}-{spread['p90']:.0f})"
        score = "-" if task["score"] is None else f"{100 * task['score']:.1f} ± {100 * task['standard_error']:.1f}"
        rows.append((name, task["metric"], score, f"{task['items']}{of}", f"{speed['tokens_per_forward']:.2f}", rates))
    for name, metrics in results.get("harness", {}).get("results", {}).items():
        values = [f"{key.partition(',')[0]} {value:.4f}" for key, value in metrics.items() if isinstance(value, float)]
        rows.append((name, "lm-eval", ", ".join(values), "", "", ""))
    scores = [task["score"] for task in tasks.values() if task["score"] is not None]
    if len(scores) > 1:
        rows.append(("mean", "", f"{100 * sum(scores) / len(scores):.1f}", "", "", ""))
    print_table(console, ("task", "metric", "score", "items", "tokens per forward", "tokens/s"), rows)
    too_long = [f"{task['too_long']} of {name}" for name, task in tasks.items() if task["too_long"]]
    if too_long:
        console.print(f"not asked, and wrong: {', '.join(too_long)}, too long for the model's context", soft_wrap=True)


def print_benchmarks(console: Console, benchmarks: Sequence[Mapping[str, Any]]) -> None:
    """Print what becomes of every benchmark of a suite: its score, the tasks that would run it, or why it is not run.

    Args:
        console: where.
        benchmarks: fields of `BenchmarkResult`.
    """
    model = next(iter(benchmarks[0]["published"]))
    rows = []
    for each in benchmarks:
        score = "not run" if each["reason"] else "" if each["score"] is None else f"{each['score']:.2f}"
        notes = [" ".join(each["tasks"]), each["metric"], each["differs"] and f"differs: {each['differs']}"]
        about = each["reason"] or "; ".join(note for note in notes if note)
        cells = (each["benchmark"], score, str(each["items"] or ""), f"{each['published'][model]:.2f}", about)
        rows.append([Text(cell, style="dim" if each["reason"] else "") for cell in cells])
    print_table(console, ("benchmark", "score", "items", model, _ABOUT), rows, wide=_ABOUT)


def list_tasks() -> None:
    """Print the suites and our own tasks, a line for each."""
    from unmask.eval.suite import own_tasks

    typer.echo(f"suites: {MINI5}, {LLADA2}\n")
    for task in own_tasks().values():
        typer.echo(f"{task.name:24} {task.dimension:10} {task.metric}; {task.licence}")
