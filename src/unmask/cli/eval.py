"""`unmask eval`: scores, with the speed of the same answers beside them.

Owns the options and the order of things. Tasks, runner and harness are `unmask.eval`'s.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli import decoding as options
from unmask.cli import evaluation
from unmask.cli.console import make_console
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.eval.registry import Planned


def eval_(
    model: options.Model = options.DIFFUSION_MODEL,
    suite: evaluation.Suite = None,
    tasks: evaluation.Tasks = None,
    needle: Annotated[str | None, typer.Option(help="Context lengths for needle tests, in tokens, with commas.")] = None,
    yarn: Annotated[float | None, typer.Option(help="Stretch the context by this factor (YaRN).")] = None,
    limit: evaluation.Limit = None,
    split: evaluation.SplitName = "test",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; left out: out/eval/MODEL-SUITE.")] = None,
    resume: evaluation.Resume = False,
    block_size: options.BlockSize = None,
    threshold: options.Threshold = None,
    steps: options.Steps = None,
    preset: options.Preset = None,
    edit_threshold: options.EditThreshold = None,
    speculative: options.Speculative = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token; left out: 0.")] = None,
    samples: Annotated[int, typer.Option(help="Draws per block of a likelihood's bound (diffusion, lm-eval).")] = 16,
    batch: evaluation.Batch = 1,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="lm-eval prompts through the chat template or as they are.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let lm-eval's own tasks run model-written code, unprotected.")
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.QuantizeAuto = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run, and what cannot and why.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List our own tasks and suites.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results, or the plan, as JSON.")] = False,
) -> None:
    """Measure quality, and the speed it comes at.

    \b
    unmask eval --suite mini-5
    unmask eval --model out/mine --tasks humaneval-offline,mini-5/math --limit 20
    unmask eval --model out/mine --tasks arc_challenge,hellaswag --limit 100
    unmask eval --needle 2048,8192,16384 --yarn 2 --limit 20
    unmask eval --suite llada2-47 --dry-run

    A killed run goes on with --resume. Likelihoods of a diffusion model are lower bounds, and said to be.
    """
    from unmask.eval.outside import Target
    from unmask.eval.registry import load_suite
    from unmask.eval.suite import EvalRun, own_tasks, plan_suite

    console = make_console(stderr=as_json)
    if show:
        typer.echo(f"suites: {evaluation.MINI5}, {evaluation.LLADA2}\n")
        typer.echo(evaluation.own_names(list(own_tasks().values())))
        return
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be at least 1")
    given = {"block_size": block_size, "threshold": threshold, "steps": steps, "preset": preset}
    decoding = options.given(**given, edit_threshold=edit_threshold, temperature=temperature, speculative=speculative)
    settings = evaluation.settings_of(split, decoding, batch)
    whole = None if suite in (None, evaluation.MINI5) else load_suite(str(suite))
    name = f"{Path(model).name}-{Path(suite or tasks or f'needle-{needle}').name}".replace(",", "+").replace("/", "-")
    folder = out if out is not None else Path("out/eval") / name
    planned = None if whole is None else plan_suite(whole, target=Target(model=model, folder=f"{folder}/outside"))
    chosen = evaluation.choose(None if whole else suite, tasks, needed=whole is None and needle is None)
    if dry_run:
        _show_plan(console, chosen, planned, limit, as_json=as_json)
        return
    language_model = evaluation.open_model(model, dtype=dtype, device=device, quantize=quantize, yarn=yarn)
    if needle is not None:
        chosen = replace(chosen, own=(*chosen.own, *evaluation.needles(needle, language_model)))
    run = EvalRun(
        model=language_model,
        folder=folder,
        count=partial(evaluation.count_for, limit),
        limit=limit,
        settings=settings,
        harness={"samples": samples, "batch": batch, "decoding": decoding, "chat": chat, "allow_code": allow_code},
        resume=resume,
    )
    with evaluation.showing_tasks(console) as on_progress:
        results = run.suite(whole, planned, on_progress) if whole and planned else run.tasks(chosen, on_progress)
    if as_json:
        typer.echo(json.dumps(results))
    elif whole is None:
        evaluation.print_results(console, results)
    else:
        _print_suite(console, results)
    console.print(f"results  {folder}", soft_wrap=True)


def _show_plan(
    console: Console, chosen: evaluation.Chosen, planned: list[Planned] | None, limit: int | None, *, as_json: bool
) -> None:
    """What would run."""
    from unmask.eval.registry import render_plan, to_json

    if planned is not None:
        if as_json:
            typer.echo(json.dumps(to_json(planned)))
        else:
            render_plan(console, planned)
    else:
        own = [f"{task.name}: {evaluation.count_for(limit, task)} items" for task in chosen.own]
        typer.echo("\n".join([*own, *(f"{name}: lm-eval" for name in chosen.harness)]))


def _print_suite(console: Console, results: dict[str, Any]) -> None:
    """What was run of the 47, beside the published scores over the same benchmarks; what was not, and why."""
    from rich.table import Table
    from rich.text import Text

    table = Table("benchmark", "score", "of", "LLaDA2.0-mini", "note")
    for entry in results["benchmarks"]:
        score = "not run" if entry["score"] is None else f"{entry['score']:.2f}"
        cells = (entry["benchmark"], score, entry["items"], f"{entry['published']:.2f}", entry["note"])
        table.add_row(*(Text(cell, style="dim" if entry["score"] is None else "") for cell in cells))
    console.print(table)
    whole = results["mean"]
    if whole["mean"] is None:
        console.print("Nothing of the suite was run.")
        return
    told = ", ".join(f"{name} {value:.2f}" for name, value in whole["published"].items())
    console.print(f"mean over the {whole['run']} of {whole['total']} that were run: {whole['mean']:.2f}", soft_wrap=True)
    console.print(f"published, over the same {whole['run']}: {told}", soft_wrap=True)
