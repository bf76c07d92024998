"""`unmask trace`: a plot of the order in which the tokens of an answer were decoded.

Owns the plot. The engine records what happened at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli.console import make_console, pick_device
from unmask.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from unmask.engine.llm import Generation
    from unmask.engine.request import DecodingStep

_MAX_LABELS = 96


@options.with_sampling_options(surface="set", defaults={"max_new_tokens": 64})
def trace(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer.")],
    params: SamplingParams,
    out: Annotated[Path, typer.Option(help="The PNG to write.", rich_help_panel="Output")] = Path("trace.png"),
    model: options.Model = options.CONVERTED_MODEL,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as plain text, without the chat template.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
) -> None:
    """Plot the order in which the tokens of an answer are decoded.

    \b
    unmask trace "What is 17 plus 25?" --out order.png
    unmask trace "List five fruits." --threshold 0.7 --block-size 32

    Columns are tokens, rows are forwards. The colour is the model's confidence in its candidate token; a dot marks the forward
    that accepted the token, a cross one that edited it.
    """
    import unmask
    from unmask.cli.watch import costs

    language_model = unmask.load(model, dtype=dtype, device=pick_device(device), quantize=quantize)
    generation = language_model.generate(prompt, params, chat=False if raw else None, trace=True)
    assert language_model.tokenizer is not None, "generate() refuses a model without a tokenizer"
    draw_trace(generation, language_model.tokenizer.decode, out)
    console = make_console()
    console.print(costs(generation), soft_wrap=True)
    console.print(f"plot     {out}", soft_wrap=True)


def draw_trace(generation: Generation, decode: Callable[[Sequence[int]], str], out: Path) -> None:
    """Write the plot of a traced generation.

    Args:
        generation: from a call with `trace=True`.
        decode: text of ids, for the labels.
        out: PNG file; its folder is created.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, count = generation.trace, len(generation.ids)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.24 * count), max(3.0, 0.2 * len(steps) + 1.6)), layout="constrained")
    first = min((step.start + i for step in steps for i, fixed in enumerate(step.fixed) if not fixed), default=0)
    _draw_confidence(axes, steps, first, count)
    events = {"accepted": ("o", [step.accepted for step in steps]), "edited": ("x", [step.edited for step in steps])}
    for label, (marker, flags) in events.items():
        marks = token_marks(steps, flags, first, count)
        if marks:
            columns, rows = zip(*marks, strict=True)
            axes.scatter(columns, rows, marker=marker, s=18, c="black", linewidths=1, label=label)
    axes.set(xlabel="token of the answer", ylabel="forward", title=f"{count} tokens in {generation.forwards} forwards")
    if count <= _MAX_LABELS:
        labels = [decode([token]).replace("\n", "⏎").replace("$", r"\$") or "∎" for token in generation.ids]
        axes.set_xticks(range(count), labels, rotation=90, fontsize=7)
    axes.legend(loc="upper right", fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _draw_confidence(axes: Axes, steps: Sequence[DecodingStep], first: int, count: int) -> None:
    """Draw the confidence in every candidate as an image."""
    import numpy as np

    image = np.full((len(steps), count), np.nan)
    for row, step in enumerate(steps):
        for i, (candidate, confidence) in enumerate(zip(step.guess, step.confidence, strict=True)):
            column = step.start + i - first
            if candidate is not None and 0 <= column < count:
                image[row, column] = confidence
    drawn = axes.imshow(image, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest", alpha=0.75)
    assert axes.figure is not None
    axes.figure.colorbar(drawn, ax=axes, label="confidence in the candidate")


def token_marks(
    steps: Sequence[DecodingStep], flags: Sequence[Sequence[bool]], first: int, count: int
) -> list[tuple[int, int]]:
    """(column, row) of every flagged token of the answer."""
    marks = []
    for row, (step, step_flags) in enumerate(zip(steps, flags, strict=True)):
        columns = [step.start + i - first for i, flagged in enumerate(step_flags) if flagged]
        marks += [(column, row) for column in columns if 0 <= column < count]
    return marks
