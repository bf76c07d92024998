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
from unmask.cli.console import visible
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import RequestError

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@options.with_sampling_options("Sampling", "Diffusion", texts={"block_size": "the whole text, so that a hole sees all of it"})
def infill(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Text with one or more holes.")],
    params: SamplingParams,
    model: options.Model = options.CONVERTED_MODEL,
    hole: Annotated[str, typer.Option(help="How a hole is written.")] = "___",
    tokens: Annotated[str, typer.Option(help="Tokens of a hole, as 8, or as 2-12 to keep the likeliest length.")] = "1-8",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = "auto",
    lora: options.Lora = None,
    as_json: options.AsJson = False,
) -> None:
    """Fill the holes of a text, reading what stands on both sides: what a left-to-right model cannot do.

    \b
    unmask infill "def f(x): ___ return y"
    unmask infill "The capital of ___ is Paris." --tokens 1-4
    unmask infill "Dear [GAP], thank you for the [GAP]." --hole "[GAP]" --json

    All lengths that --tokens names are tried together; the filling whose tokens are likeliest is printed.
    """
    match = _RANGE.fullmatch(tokens)
    if match is None:
        raise RequestError(f"--tokens is {tokens!r}; write a number, or two as in 2-12")
    lengths = (int(match[1]), int(match[2] or match[1]))
    filling = options.load(model, dtype, device, quantize, lora=lora).infill(text, params, hole=hole, tokens=lengths)
    typer.echo(json.dumps(asdict(filling)) if as_json else visible(filling.text))
