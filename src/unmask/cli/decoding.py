"""Options that every decoding verb shares: their help texts once, and how files of rules are read.

Owns the annotated types. Knows no verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from unmask.errors import RequestError

DIFFUSION_MODEL = "smollm2-135m-diffusion"
CONVERTED_MODEL = "smollm2-135m-converted"
"""Converted in full: denoises in any order, and reads both sides of a hole."""

Model = Annotated[str, typer.Option("--model", "-m", help="Folder, Hugging Face id or embedded model.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens denoised together; left out: the model's.")]
Threshold = Annotated[
    float | None, typer.Option(help="Accept every token more probable than this; left out: 0.95, of checked drafts 0.7.")
]
Steps = Annotated[int | None, typer.Option(help="Most steps per block; left out: the block size.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; left out: all.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this mass; left out: all.")]
Seed = Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")]
Preset = Annotated[
    str | None,
    typer.Option(help="speed or quality: LLaDA2.1's settings, for models trained to edit decided tokens."),
]
EditThreshold = Annotated[
    float | None, typer.Option(help="Replace a decided token when another is more probable than this; left out: never.")
]
Speculative = Annotated[
    bool | None,
    typer.Option(
        "--speculative/--no-speculative",
        help="Check what is drafted, so that the text is that of decoding token by token; left out: for shifted models, "
        "unless a policy or edits are asked for.",
    ),
]
Policy = Annotated[str | None, typer.Option(help="What a step accepts: threshold, entropy or fixed; left out: threshold.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Quantize = Annotated[
    str | None,
    typer.Option(help="int8, int4 or auto: decode with quantised weights on the CPU; left out: the weights as they are."),
]
QuantizeAuto = Annotated[
    Literal["auto", "none", "int8", "int4"],
    typer.Option(help="Decode with quantised weights; auto: int8 on a CPU where the model allows it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object: the text and what it cost.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those left out keep the decoder's defaults."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def read_rules(path: Path | None, option: str) -> str | None:
    """Text of a schema or grammar file.

    Raises:
        RequestError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{option} {path} cannot be read ({error}); name a text file") from error
