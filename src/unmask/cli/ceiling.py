"""`unmask ceiling`: what drafts that are always right would gain, and what a model's own drafts reach of it.

Owns the options and the tables. The figures are `unmask.eval.ceiling`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli import decoding as options
from unmask.cli.console import make_console
from unmask.cli.tables import print_table

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS = {
    "tokens": "tokens",
    "ceiling": "ceiling",
    "drafts": "drafts alone",
    "achieved": "achieved",
    "accepted_length": "accepted length",
    "introspective_acceptance": "introspective acceptance",
}


def ceiling(
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS", help="Lines of text, or JSON lines with messages or prompt.")],
    model: options.Model = options.DIFFUSION_MODEL,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts. [default: all]")] = None,
    block_size: Annotated[int | None, typer.Option(min=2, help="Tokens of a block. [default: the model's]")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer.")] = 128,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure whether training drafts further is worth it: tokens per forward at best, of the drafts alone, and achieved.

    \b
    unmask ceiling prompts.jsonl --model out/faster --limit 20
    unmask ceiling prompts.txt --model out/joint --json

    Answers are greedy. Drafts are made behind every token of them, so that a few prompts give thousands of drafts.
    """
    from unmask.cli.evaluation import open_model
    from unmask.cli.progress import counting
    from unmask.eval.ceiling import measure, read_prompts

    console = make_console(stderr=as_json)
    chosen = read_prompts(prompts)[:limit]
    language_model = open_model(model, dtype=dtype, device=device, quantize=quantize)
    with counting(console, "prompts") as on_progress:
        figures = measure(language_model, chosen, block_size=block_size, max_new_tokens=max_new_tokens, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps({"model": model, "prompts": str(prompts), **figures}))
    else:
        _print(console, figures)


def _print(console: Console, figures: dict[str, Any]) -> None:
    rows = [(name, figures["kinds"][name]) for name in figures["kinds"]] + [("all", figures["all"])]
    cells = [[name, *(_number(each[key]) for key in _COLUMNS)] for name, each in rows]
    title = f"tokens per forward, block size {figures['block_size']}"
    print_table(console, ["prompts", *_COLUMNS.values()], cells, title=title)
    if figures["distances"]:
        head = ["distance", "acceptance", "reach", "overlap"]
        print_table(console, head, [[_number(row[name]) for name in head] for row in figures["distances"]])
    speed = figures["speed"]
    console.print(
        f"speed against token by token, once the prompt is read: {speed['ceiling']:.2f} if every draft were right"
        + ("" if speed["drafts"] is None else f", {speed['drafts']:.2f} with these drafts"),
        soft_wrap=True,
    )


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
