"""`unmask infill`: fill the holes of a text, with both sides in view.

Owns the options and what is printed. Choosing a filling is `engine.infill`'s.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli.console import pick_device, visible
from unmask.errors import RequestError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def infill(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text with one or more holes.")],
    model: options.Model = options.CONVERTED_MODEL,
    hole: Annotated[str, typer.Option(help="How a hole is written.")] = "___",
    tokens: Annotated[str, typer.Option(help="Tokens of a hole, as 8, or as 2-12 to keep the likeliest length.")] = "1-8",
    block_size: Annotated[
        int | None, typer.Option(help="Tokens denoised together; left out: the whole text, so that a hole sees all of it.")
    ] = None,
    threshold: options.Threshold = None,
    steps: options.Steps = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    as_json: options.AsJson = False,
) -> None:
    """Fill the holes of a text, reading what stands on both sides: what a left-to-right model cannot do.

    \b
    unmask infill "def f(x): ___ return y"
    unmask infill "The capital of ___ is Paris." --tokens 1-4
    unmask infill "Dear [GAP], thank you for the [GAP]." --hole "[GAP]" --json

    All lengths that --tokens names are tried together; the filling whose tokens are likeliest is printed.
    """
    found = _RANGE.fullmatch(tokens)
    if found is None:
        raise RequestError(f"--tokens is {tokens!r}; write a number, or two as in 2-12")
    least = int(found[1])
    wanted = options.given(block_size=block_size, threshold=threshold, steps=steps, temperature=temperature, seed=seed)

    import unmask

    language_model = unmask.load(model, dtype=dtype, device=pick_device(device), quantize=quantize)
    filling = language_model.infill(text, hole=hole, tokens=(least, int(found[2] or least)), **wanted)
    typer.echo(json.dumps(asdict(filling)) if as_json else visible(filling.text))
