"""`unmask trace`: a plot of the order in which the tokens of an answer were decoded.

Owns the plot. The engine records what happened at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli.console import make_console
from unmask.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unmask.data.detokenizer import Decode
    from unmask.engine.generation import Generation
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
    quantize: options.Quantize = "auto",
) -> None:
    """Plot the order in which the tokens of an answer are decoded.

    \b
    unmask trace "What is 17 plus 25?" --out order.png
    unmask trace "List five fruits." --threshold 0.7 --block-size 32

    Columns are tokens, rows are forwards. The colour is the model's confidence in its candidate token; a dot marks the forward
    that accepted the token, a cross one that edited it.
    """
    from unmask.cli.watch import costs

    language_model = options.load(model, dtype, device, quantize)
    generation = language_model.generate(prompt, params, chat=False if raw else None, trace=True)
    assert language_model.tokenizer is not None, "generate() refuses a model without a tokenizer"
    draw_trace(generation, language_model.tokenizer.decode, out)
    console = make_console()
    console.print(costs(generation), soft_wrap=True)
    console.print(f"plot     {out}", soft_wrap=True)


def draw_trace(generation: Generation, decode: Decode, out: Path) -> None:
    """Write the plot of a traced generation.

    Args:
        generation: from a call with `trace=True`.
        decode: text of ids, for the labels.
        out: PNG file; its folder is created.
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, count = generation.trace, len(generation.ids)
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.24 * count), max(3.0, 0.2 * len(steps) + 1.6)), layout="constrained")
    # A confidence of 0 stands for a position without a candidate.
    confidence = by_step(generation, lambda step: [value or np.nan for value in step.confidence])
    drawn = axes.imshow(confidence, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest", alpha=0.75)
    figure.colorbar(drawn, ax=axes, label="confidence in the candidate")
    accepted, edited = by_step(generation, lambda step: step.accepted), by_step(generation, lambda step: step.edited)
    for label, marker, flags in (("accepted", "o", accepted), ("edited", "x", edited)):
        rows, columns = np.nonzero(flags == 1)
        if len(rows):
            axes.scatter(columns, rows, marker=marker, s=18, c="black", linewidths=1, label=label)
    axes.set(xlabel="token of the answer", ylabel="forward", title=f"{count} tokens in {generation.forwards} forwards")
    if count <= _MAX_LABELS:
        texts = (decode([token], after=generation.ids[:index]) for index, token in enumerate(generation.ids))
        labels = [text.replace("\n", "⏎").replace("$", r"\$") or "∎" for text in texts]
        axes.set_xticks(range(count), labels, rotation=90, fontsize=7)
    axes.legend(loc="upper right", fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def by_step(generation: Generation, read: Callable[[DecodingStep], Sequence[float]]) -> NDArray[np.float64]:
    """What `read` gives for the positions of each step: [forwards, tokens of the answer], NaN at positions outside the step."""
    import numpy as np

    first = min((step.start + step.fixed.index(False) for step in generation.trace if False in step.fixed), default=0)
    image = np.full((len(generation.trace), len(generation.ids)), np.nan)
    for row, step in enumerate(generation.trace):
        for column, value in enumerate(read(step), start=step.start - first):
            if 0 <= column < image.shape[1]:
                image[row, column] = value
    return image
