"""`unmask eval`: scores of a model, with the speed of the same answers beside them.

Owns the options and their order. Tasks, runner and harness are `unmask.eval`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli import decoding as options
from unmask.cli import evaluation
from unmask.cli.console import make_console
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.eval.registry import Suite
    from unmask.eval.suite import Selection


@options.with_sampling_options("Sampling", "Diffusion", "Speculative")
def eval_(
    params: SamplingParams,
    model: options.Model = options.DIFFUSION_MODEL,
    suite: evaluation.SuiteName = None,
    tasks: evaluation.TaskNames = None,
    needle: Annotated[str | None, typer.Option(help="Context lengths of needle tests, in tokens, with commas.")] = None,
    yarn: evaluation.Yarn = None,
    limit: evaluation.Limit = None,
    split: evaluation.SplitName = "test",
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: out/eval/MODEL-SUITE]")] = None,
    resume: evaluation.Resume = False,
    samples: Annotated[int, typer.Option(min=2, help="Monte Carlo samples per block of a likelihood bound.")] = 16,
    batch: evaluation.Batch = 1,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Apply the chat template to lm-eval's prompts.")] = False,
    allow_code: evaluation.AllowCode = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = "auto",
    expert_capacity: options.ExpertCapacity = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and why the rest would not.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List our own tasks and suites.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results, or the plan, as JSON.")] = False,
) -> None:
    """Measure quality, and the speed of the same answers.

    \b
    unmask eval --suite mini-5
    unmask eval --model out/mine --tasks humaneval-offline,mini-5/math --limit 20
    unmask eval --model out/mine --tasks arc_challenge,hellaswag --limit 100
    unmask eval --needle 2048,8192,16384 --yarn 2 --limit 20
    unmask eval --suite llada2-47 --dry-run

    --resume continues a killed run. Likelihoods of a diffusion model are lower bounds; the results say so.
    """
    from unmask.eval.runner import EvalSettings
    from unmask.eval.suite import EvalRun

    console = make_console(stderr=as_json)
    if show:
        evaluation.list_tasks()
        return
    report = evaluation.open_suite(suite)
    selection = evaluation.select_tasks(None if report else suite, tasks, required=report is None and needle is None)
    if dry_run:
        _show_plan(console, selection, report, limit, as_json=as_json)
        return
    folder = _folder(out, model, suite or tasks or f"needle-{needle}", resume=resume)
    language_model = evaluation.open_model(
        model, dtype=dtype, device=device, quantize=quantize, yarn=yarn, expert_capacity=expert_capacity
    )
    selection = replace(selection, own=(*selection.own, *evaluation.needles(needle, language_model)))
    run = EvalRun(
        model=language_model, folder=folder, count=partial(evaluation.count_for, limit), limit=limit, resume=resume,
        settings=EvalSettings(split, params, batch),
        harness={"samples": samples, "batch": batch, "decoding": params, "chat": chat, "allow_code": allow_code},
    )  # fmt: skip
    with evaluation.showing_tasks(console, "the same command with --resume") as on_progress:
        results = run.suite(report, on_progress) if report else run.tasks(selection, on_progress)
    _print(console, results, folder, is_suite=report is not None, as_json=as_json)


def _print(console: Console, results: Mapping[str, Any], folder: Path, *, is_suite: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(results))
    else:
        (_print_suite if is_suite else evaluation.print_results)(console, results)
    console.print(f"results  {folder}", soft_wrap=True)


def _folder(out: Path | None, model: str, tasks: str, *, resume: bool) -> Path:
    """The folder of a run, named after the model and the tasks unless `out` is given.

    Raises:
        ConfigError: it holds a run, which is not to be resumed.
    """
    name = f"{Path(model).name}-{Path(tasks).name}".replace(",", "+").replace("/", "-")
    folder = out if out is not None else Path("out/eval") / name
    if not resume and any((folder / file).exists() for file in ("samples.jsonl", "suite.json", "harness.json")):
        raise ConfigError(f"{folder} holds a run already; add --resume to continue it, or use another --out")
    return folder


def _show_plan(console: Console, selection: Selection, report: Suite | None, limit: int | None, *, as_json: bool) -> None:
    """Print what would run."""
    from unmask.eval.suite import plan_suite

    if report is None:
        own = [f"{task.name}: {evaluation.count_for(limit, task)} items" for task in selection.own]
        typer.echo("\n".join([*own, *(f"{name}: lm-eval" for name in selection.harness)]))
        return
    plan = [asdict(result) for result in plan_suite(report)]
    runnable = sum(each["reason"] is None for each in plan)
    if as_json:
        counts = {"total": len(plan), "run": runnable, "not_run": len(plan) - runnable}
        typer.echo(json.dumps({**counts, "benchmarks": plan}))
        return
    evaluation.print_benchmarks(console, plan)
    console.print(f"{runnable} of {len(plan)} run here, {len(plan) - runnable} do not.", soft_wrap=True)


def _print_suite(console: Console, results: Mapping[str, Any]) -> None:
    """Print the benchmarks of a suite, and the mean beside the published means over the same benchmarks."""
    evaluation.print_benchmarks(console, results["benchmarks"])
    mean = results["mean"]
    if mean["mean"] is None:
        console.print("No benchmark of the suite was run.")
        return
    published = ", ".join(f"{model} {value:.2f}" for model, value in mean["published"].items())
    console.print(f"mean over the {mean['run']} of {mean['total']} that were run: {mean['mean']:.2f}", soft_wrap=True)
    console.print(f"published, over the same {mean['run']}: {published}", soft_wrap=True)
