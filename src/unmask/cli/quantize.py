"""`unmask quantize`: write a model with 8- or 4-bit weights, for the CPU kernels.

Owns the options and the report. The job is `models.native.quantization_job`'s.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from unmask.cli.console import make_console, program
from unmask.cli.interrupt import interruptible
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model or adapter, Hugging Face id, or embedded model.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New or empty folder, or one of the same job, which goes on.")],
    bits: Annotated[Literal["8", "4"], typer.Option(help="Of the layers' weights; 4 have a scale for every 32 inputs.")] = "4",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DATA|none",
            help="Text whose activations 4 bits are rounded for, a file, folder or dataset id; or none.",
            show_default="a text that comes with unmask",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Quantise the first layers only, to measure with.", show_default="all")
    ] = None,
) -> None:
    """Write a model with 8- or 4-bit weights into a folder that decodes by the CPU kernels.

    Such a folder is given like any model (generate, chat, serve, eval ...). It is opened in seconds, whatever its size: weights
    are mapped, shared between processes, and read from disk as they are needed where memory is short. Layers are read, rounded
    and written one after the other, in less than 2 GB of memory; an interrupted job goes on where it was.

    4 bits are rounded by GPTQ for the activations of a text, which should be like what the model will read and write; some
    matrices keep 8 bits. Without (--calibrate none) it takes a fraction of the time, and loses more.

    \b
    unmask quantize out/mine --out out/mine-int4
    unmask quantize out/mine --calibrate chats.jsonl --out out/mine-int4
    unmask quantize inclusionAI/LLaDA2.0-mini --bits 8 --out models/mini-int8
    unmask chat --model out/mine-int4
    """
    from rich.filesize import decimal

    from unmask.cli.progress import counting
    from unmask.models.native.quantization_job import QuantizationJob
    from unmask.models.native.recipe import CALIBRATED, QuantizationRecipe
    from unmask.models.weights.hub import resolve

    console, started = make_console(), time.monotonic()
    folder, recipe, tokens_RT = resolve(model), QuantizationRecipe(int(bits)), None
    if bits == "4" and calibrate != "none":
        recipe, tokens_RT = CALIBRATED, _rows(folder, calibrate)
    elif calibrate not in (None, "none"):
        raise ConfigError("--calibrate is for --bits 4: 8 bits are rounded to nearest; leave it out")
    job = QuantizationJob(model, folder, recipe, num_layers=layers, tokens_RT=tokens_RT)
    with interruptible("the same command"), counting(console, "quantising (MB)") as on_progress:
        manifest = job.run(out, on_progress)
    files = len(manifest.pieces)
    console.print(
        f"model    {out}: {manifest.quantize}, {decimal(manifest.num_bytes)} in {files} files, "
        f"{time.monotonic() - started:.0f} s",
        soft_wrap=True,
    )
    console.print(f"decode   {program()} chat --model {out}", soft_wrap=True)


def _rows(folder: Path, data: str | None) -> Tensor:
    """Rows of the text to calibrate with; `data`: as of `--calibrate`."""
    from unmask.cli.data_option import text_source
    from unmask.data.calibration import calibration_rows, packaged_text

    return calibration_rows(text_source(folder, data or str(packaged_text()), "--calibrate"))
