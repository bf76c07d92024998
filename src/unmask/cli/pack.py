"""`unmask pack`: tokenise and pack a recipe's data beforehand.

Owns the options and the report. What is packed is `train.pack`'s matter.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmask.cli.console import make_console, program
from unmask.cli.data_option import check_paths, source_of
from unmask.cli.interrupt import interruptible
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.data.packed import Manifest
    from unmask.train.recipe import Recipe

_RECIPES = (".yaml", ".yml")


def pack(
    inputs: Annotated[
        list[str], typer.Argument(metavar="RECIPE|DATA...", help="A YAML recipe; or files, folders or dataset ids to train on.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the packed rows.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model whose tokenizer is used, instead of the recipe's.")
    ] = None,
    verb: Annotated[
        Literal["convert", "sft", "dpo"], typer.Option("--for", help="DATA: the command that will train on the rows.")
    ] = "convert",
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes that tokenise.", show_default="one for each core")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the data.", show_default="RECIPE: as many tokens as it trains on; DATA: 1"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a value of the recipe; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the job in --out, as it was started.")] = False,
) -> None:
    """Tokenise and pack training data beforehand, in parallel processes, into files that are memory-mapped.

    A run on the folder has the rows, and so the losses, of a run on the data themselves; it starts at once, resumes at once,
    and each of several processes reads its own rows only. The rows fit one tokenizer, chat template, mask token, row length and
    kind of training: another recipe is refused. An interrupted job goes on with --resume.

    \b
    unmask pack recipes/mine.yaml --out data/mine
    unmask convert --recipe recipes/mine.yaml --data data/mine --out out/mine
    unmask pack a.jsonl b.jsonl --model Qwen/Qwen3-0.6B --set data.row_length=1024 --out data/both
    unmask pack preferences.jsonl --for dpo --model out/chat --out data/pairs
    """
    from unmask.cli.progress import counting
    from unmask.cores import num_cores
    from unmask.train.pack import PROGRESS, pack_recipe

    recipe, given = _recipe(inputs, model, verb, overrides or [])
    check_paths(source.path for source in recipe.data.sources)
    if (out / PROGRESS).is_file() and not resume:
        raise ConfigError(f"{out} holds an unfinished job; go on with --resume, or choose another --out")
    console, started = make_console(), time.monotonic()
    processes = nproc or num_cores()
    passes = epochs if given or epochs is not None else 1
    with interruptible("the same command with --resume"), counting(console, "packing") as on_progress:
        manifest = pack_recipe(recipe, out, nproc=processes, epochs=passes, resume=resume, on_progress=on_progress)
    for line in _report(manifest, time.monotonic() - started):
        console.print(line, soft_wrap=True)
    options = ["--recipe", inputs[0]] if given else [] if model is None else ["--model", model]
    kind = _verb_of(recipe)
    command = [program(), kind, *options, *(word for each in overrides or [] for word in ("--set", each))]
    console.print(f"train    {shlex.join([*command, '--data', str(out), '--out', 'out/mine'])}", soft_wrap=True)


def _recipe(inputs: Sequence[str], model: str | None, verb: str, overrides: Sequence[str]) -> tuple[Recipe, bool]:
    """The recipe of the rows, and whether it was given."""
    from unmask.cli.training import make_plan
    from unmask.train.recipe import load_recipe

    options = [] if model is None else [f"model={json.dumps(model)}"]
    recipes = [name for name in inputs if name.endswith(_RECIPES)]
    if not recipes:
        sources = json.dumps([source_of(name) for name in inputs])
        return make_plan(verb, None, None, None, [*options, f"data.sources={sources}", *overrides], None), False
    if len(inputs) > 1:
        raise ConfigError(f"{recipes[0]} is a recipe, which names its data; give it alone, or data without it")
    return load_recipe(Path(recipes[0]), [*options, *overrides]), True


def _verb_of(recipe: Recipe) -> str:
    if recipe.objective.pairs:
        return "dpo"
    return "sft" if recipe.schedule is None else "convert"


def _report(manifest: Manifest, seconds: float) -> list[str]:
    """What is in the folder, line by line."""
    stats = manifest.stats
    share = stats.padded_tokens / max(stats.packed_tokens + stats.padded_tokens, 1)
    held_out = 0 if manifest.validation is None else manifest.validation.rows
    size = sum(file.bytes for file in manifest.files) / 2**20
    return [
        f"packed   {stats.packed_tokens:,} tokens in {manifest.num_rows:,} rows of {manifest.settings['row_length']} "
        f"({share:.1%} padding), {held_out} held-out rows; {size:,.1f} MiB, {seconds:.1f} s",
        stats.summary,
    ]
