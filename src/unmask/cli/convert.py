"""`unmask convert`: train a block-diffusion model from an autoregressive one.

Owns how options become a recipe and what is printed about the run. The run itself is `train.convert`'s.
"""

from __future__ import annotations

import json
import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.console import INTERRUPTED, make_console, pick_device, try_command
from unmask.cli.data_option import source_of
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.train.convert import ConvertResult
    from unmask.train.recipe import Recipe

_NO_DATA = "no data: name a file or dataset with --data, or a recipe that has sources with --recipe"


def convert(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run: checkpoints, metrics, plot and the model.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file; left out: a short run for a laptop.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model to start from, instead of the recipe's.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="File, folder, dataset id or reasoning_gym:FAMILY, instead of the recipe's sources."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a value of the recipe; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; alone, with its own recipe.")] = False,
) -> None:
    """Convert an autoregressive model to block diffusion.

    \b
    unmask convert --model smollm2-135m --data answers.jsonl --out out/mine
    unmask convert --data reasoning_gym:chain_sum --out out/sums --set train.tokens=20000
    unmask convert --recipe recipes/smollm2-135m_convert_cpu.yaml --out out/cpu
    unmask convert --out out/mine --resume

    A jsonl or parquet record holds "text", "messages", or "prompt" and "response". Ctrl-C saves a checkpoint and stops.
    """
    plan = _plan(recipe, model, data, overrides or [], out if resume else None)
    pick_device(plan.train.device)
    finished = _run(plan, out, resume=resume)
    console = make_console()
    console.print(f"trained  {finished.tokens:,} tokens in {finished.steps:,} steps", soft_wrap=True)
    console.print(f"model    {finished.folder}", soft_wrap=True)
    if finished.plot is not None:
        console.print(f"plot     {finished.plot}", soft_wrap=True)
    console.print(f"try it   {try_command(finished.folder)}", soft_wrap=True)


def default_recipe() -> Path:
    """The recipe of a run without --recipe."""
    return Path(str(resources.files("unmask.cli") / "default_recipe.yaml"))


def _plan(recipe: Path | None, model: str | None, data: str | None, overrides: list[str], run: Path | None) -> Recipe:
    """The recipe that the options ask for; of a run that goes on, its own unless they ask for something."""
    from unmask.train.recipe import load_recipe, parse_recipe

    asked = recipe is not None or model is not None or data is not None or bool(overrides)
    if run is not None and not asked:
        return parse_recipe(_recipe_of(run), str(run))
    if recipe is None and data is None and not any(override.startswith("data.sources") for override in overrides):
        raise ConfigError(_NO_DATA)
    options = [] if model is None else [f"model={json.dumps(model)}"]
    if data is not None:
        options.append(f"data.sources={json.dumps([source_of(data)])}")
    return load_recipe(recipe or default_recipe(), [*options, *overrides])


def _recipe_of(run: Path) -> dict[str, object]:
    from unmask.models.checkpoint import read_json
    from unmask.train.state import list_checkpoints

    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ConfigError(f"{run} holds no checkpoint to resume; give --data or --recipe as when it was started")
    values = read_json(checkpoints[-1] / "state.json").get("recipe")
    if not isinstance(values, dict):
        raise ConfigError(f"{checkpoints[-1]} names no recipe; remove it to resume from an earlier one")
    return values


def _run(recipe: Recipe, out: Path, *, resume: bool) -> ConvertResult:
    """Carry the recipe out; an interrupted run ends the program, with the command that goes on."""
    from unmask.cli.interrupt import stop_on_interrupt
    from unmask.cli.progress import showing_progress
    from unmask.train.convert import convert as run_recipe

    try:
        with stop_on_interrupt() as should_stop, showing_progress(make_console(), recipe.train.tokens) as on_record:
            result = run_recipe(recipe, out, resume=resume, on_record=on_record, should_stop=should_stop)
    except KeyboardInterrupt:
        typer.echo("interrupted; what follows the last checkpoint is lost", err=True)
        _leave(out)
    if not result.finished:
        typer.echo(f"stopped after {result.steps:,} steps, saved", err=True)
        _leave(out)
    return result


def _leave(out: Path) -> None:
    from unmask.train.state import list_checkpoints

    if list_checkpoints(out):
        typer.echo(f"resume with: {shlex.join(['unmask', 'convert', '--out', str(out), '--resume'])}", err=True)
    raise typer.Exit(INTERRUPTED)
