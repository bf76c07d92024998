"""`unmask convert`, `sft` and `dpo`: their options, the recipe that these make, and the report of a run.

Their default recipes are the files beside this one. The run itself is `train.run`'s.
"""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from unmask.cli import allocator
from unmask.cli.console import is_main_rank, make_console, pick_device, show_warning, try_command
from unmask.cli.data_option import check_paths, source_of
from unmask.cli.interrupt import SAVE_NOTICE, stop_on_interrupt
from unmask.cli.startup import INTERRUPTED
from unmask.errors import ConfigError, UnmaskNote

if TYPE_CHECKING:
    from unmask.train.parallel.dims import ParallelDims
    from unmask.train.recipe import Recipe
    from unmask.train.run import RunResult

_NO_DATA = "no data: name a file or dataset with --data, or a recipe that has sources with --recipe"

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run: checkpoints, metrics, plot and the model.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML file [default: a short run for a laptop].")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model to start from, instead of the recipe's.")]
Data = Annotated[
    str | None, typer.Option(help="File, folder, dataset id or reasoning_gym:FAMILY, instead of the recipe's sources.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a value of the recipe; may be repeated.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out; alone, with its own recipe.")]
Processes = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine, see the recipe's `parallel`.")]
MaxRestarts = Annotated[
    int, typer.Option(min=0, help="With several processes: how often they go on from the last checkpoint when one is lost.")
]


def default_recipe(verb: str) -> Path:
    """The recipe of a run of `verb` without --recipe."""
    return Path(str(resources.files("unmask.cli") / f"{verb}_recipe.yaml"))


def training_verb(name: str, help_text: str) -> Callable[..., None]:
    """The command `unmask NAME`: make a recipe of the options, run it and report the result."""

    def command(
        out: Out,
        recipe: RecipeFile = None,
        model: Model = None,
        data: Data = None,
        overrides: Overrides = None,
        resume: Resume = False,
        nproc: Processes = 1,
        max_restarts: MaxRestarts = 3,
    ) -> None:
        plan = make_plan(name, recipe, model, data, overrides or [], out if resume else None)
        if pick_device(plan.train.device) == "cpu" and (missing := allocator.hint(plan.train.tokens)) is not None:
            warnings.warn(missing, UnmaskNote, stacklevel=1)
        check_paths(source.path for source in plan.data.sources)
        _check_folder(out, resume=resume)
        try:
            result = _run(plan, out, resume) if nproc == 1 else _run_ranks(plan, out, resume, nproc, max_restarts)
        except KeyboardInterrupt:
            typer.echo("interrupted; what follows the last checkpoint is lost", err=True)
            _leave(name, out, nproc)
        if not is_main_rank():
            return
        if not result.finished:
            typer.echo(f"stopped after {result.steps:,} steps, saved", err=True)
            _leave(name, out, nproc)
        _report(plan, result)

    command.__name__, command.__doc__ = name, help_text
    return command


def _report(plan: Recipe, result: RunResult) -> None:
    """Print the result of a run."""
    console = make_console()
    console.print(f"trained  {result.tokens:,} tokens in {result.steps:,} steps", soft_wrap=True)
    console.print(result.data, soft_wrap=True)
    console.print(f"model    {result.folder}", soft_wrap=True)
    if plan.train.lora is not None:
        from unmask.train.run import ADAPTER

        console.print(f"adapter  {result.folder / ADAPTER}", soft_wrap=True)
    if result.plot is not None:
        console.print(f"plot     {result.plot}", soft_wrap=True)
    console.print(f"try it   {try_command(result.folder)}", soft_wrap=True)


def make_plan(
    verb: str, recipe: Path | None, model: str | None, data: str | None, overrides: list[str], run: Path | None
) -> Recipe:
    """The recipe of a verb's options; without any, that of the run to resume."""
    from unmask.train.recipe import load_recipe, parse_recipe

    has_options = recipe is not None or model is not None or data is not None or bool(overrides)
    if run is not None and not has_options:
        return _check_verb(verb, parse_recipe(_recipe_of(run), str(run)))
    if recipe is None and data is None and not any(override.startswith("data.sources") for override in overrides):
        raise ConfigError(_NO_DATA)
    options = [] if model is None else [f"model={json.dumps(model)}"]
    if data is not None:
        options.append(f"data.sources={json.dumps([source_of(data)])}")
    plan = load_recipe(recipe or default_recipe(verb), [*options, *overrides])
    if recipe is None and plan.schedule is None:
        own = _own_block_size(plan.model)
        plan = load_recipe(default_recipe(verb), [*own, *options, *overrides])
    return _check_verb(verb, plan)


def _own_block_size(model: str) -> list[str]:
    """The override with which fine-tuning keeps the model's own block size, unless a recipe or --set has another."""
    from unmask.models.weights.checkpoint import read_model_config
    from unmask.models.weights.hub import resolve

    size = read_model_config(resolve(model)).block_size
    return [] if size is None else [f"decode_block_size={size}"]


def _check_verb(verb: str, recipe: Recipe) -> Recipe:
    """Raise ConfigError for a recipe of another command: objective and schedule decide which it is for."""
    right_verb, why = "convert", "has a schedule of block sizes"
    if recipe.objective.kind == "preference":
        right_verb, why = "dpo", "has the objective preference"
    elif recipe.schedule is None:
        right_verb, why = "sft", "has no schedule of block sizes"
    if right_verb != verb:
        raise ConfigError(f"the recipe {why}, which makes it one for unmask {right_verb}, not unmask {verb}; use that verb")
    return recipe


def _recipe_of(run: Path) -> dict[str, Any]:
    from unmask.files import read_json
    from unmask.train.state import list_checkpoints

    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ConfigError(f"{run} holds no checkpoint to resume; give --data or --recipe as when it was started")
    values = read_json(checkpoints[-1] / "state.json").get("recipe")
    if not isinstance(values, dict):
        raise ConfigError(f"{checkpoints[-1]} names no recipe; remove it to resume from an earlier one")
    return values


def _check_folder(out: Path, *, resume: bool) -> None:
    from unmask.train.parallel.start import restarted
    from unmask.train.run import holds_run

    if not (resume or restarted(out)) and holds_run(out):
        raise ConfigError(f"{out} already holds a run; pass --resume to continue it, or choose another --out")


def _run(recipe: Recipe, out: Path, resume: bool) -> RunResult:
    """Run the recipe in this process, which may be one of the ranks of torchrun."""
    from unmask.train.parallel.fatal import fatal_status
    from unmask.train.parallel.start import num_ranks

    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if (status := fatal_status()) is not None:
        raise typer.Exit(status)
    if torchrun and is_main_rank():
        _show_layout(recipe, num_ranks())
    with stop_on_interrupt(notice=SAVE_NOTICE if is_main_rank() else b"", once=torchrun) as should_stop:
        return _show_run(should_stop, recipe, out, resume)


def _show_layout(recipe: Recipe, ranks: int) -> ParallelDims:
    """The layout of a run; one that is chosen is printed."""
    from unmask.train.parallel.dims import layout_name
    from unmask.train.run import run_layout

    dims = run_layout(recipe, ranks)
    if recipe.parallel.auto and ranks > 1:
        typer.echo(f"parallel {layout_name(dims)}", err=True)
    return dims


def _run_ranks(recipe: Recipe, out: Path, resume: bool, ranks: int, max_restarts: int) -> RunResult:
    """Run the recipe in several processes on this machine."""
    from unmask.train.parallel.launch import Launcher
    from unmask.train.parallel.start import check_devices
    from unmask.train.run import device_of

    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(f"--nproc is {ranks}, but torchrun has started this process already; leave --nproc out")
    dims = _show_layout(recipe, ranks)
    check_devices(ranks, device_of(recipe.train))
    launcher = Launcher(ranks, max_restarts=max_restarts, logs=out / "logs")
    with stop_on_interrupt(on_stop=launcher.stop):
        result: RunResult = launcher.run(_show_run, recipe, out, resume, dims)
    return result


def _show_run(
    should_stop: Callable[[], bool], recipe: Recipe, out: Path, resume: bool, dims: ParallelDims | None = None
) -> RunResult:
    """Run the recipe as the process, or the rank, that this is; the main one shows the progress.

    `dims` is the layout that the launcher has chosen: planning takes each rank seconds.
    """
    from unmask.cli.progress import showing_progress
    from unmask.train.parallel.start import restarted
    from unmask.train.run import run_recipe

    warnings.showwarning = show_warning  # A rank has not come through the application.
    if not is_main_rank():
        return run_recipe(recipe, out, resume=resume, should_stop=should_stop, dims=dims)
    if restarted(out):
        typer.echo("note: a process was lost; all were started again and go on from the last checkpoint", err=True)
    with showing_progress(make_console(), recipe.train.tokens) as on_record:
        return run_recipe(recipe, out, resume=resume, on_record=on_record, should_stop=should_stop, dims=dims)


def _leave(verb: str, out: Path, ranks: int) -> NoReturn:
    from unmask.train.state import list_checkpoints

    if list_checkpoints(out):
        processes = ["--nproc", str(ranks)] if ranks > 1 else []
        typer.echo(f"resume with: {shlex.join(['unmask', verb, '--out', str(out), '--resume', *processes])}", err=True)
    raise typer.Exit(INTERRUPTED)


convert = training_verb(
    "convert",
    """Convert an autoregressive model to block diffusion.

\b
unmask convert --model smollm2-135m --data answers.jsonl --out out/mine
unmask convert --data reasoning_gym:chain_sum --out out/sums --set train.tokens=20000
unmask convert --recipe recipes/smollm2-135m_convert_cpu.yaml --out out/cpu
unmask convert --out out/mine --resume

A jsonl or parquet record holds "text", "messages", or "prompt" and "response". Ctrl-C saves a checkpoint and stops.
""",
)

sft = training_verb(
    "sft",
    """Fine-tune a diffusion model on conversations: only what the assistant writes is learnt.

\b
unmask sft --model out/mine --data chats.jsonl --out out/chat
unmask sft --data reasoning_gym:chain_sum --out out/sums --set objective.cap.weight=2
unmask sft --data chats.jsonl --out out/lora --set train.lora.rank=16
unmask sft --out out/chat --resume

A record holds "messages" (OpenAI), "conversations" (ShareGPT), or "prompt" and "response"; "tools" go to the chat template.
objective.cap adds confidence-aware training (CAP): more tokens per forward, at some cost in quality.
""",
)

dpo = training_verb(
    "dpo",
    """Make a diffusion model prefer one answer over another (DPO over the ELBO).

\b
unmask dpo --model out/chat --data preferences.jsonl --out out/aligned
unmask dpo --data preferences.jsonl --out out/lora --set train.lora.rank=16 --set train.freeze_embeddings=true
unmask dpo --out out/aligned --resume

A record holds "chosen" and "rejected", with or without "prompt": texts or lists of messages. The reference is a frozen copy
of the model, or, with LoRA, the model without its adapter.
""",
)
