"""`unmask generate`: answer one prompt.

Owns the options and how the answer is printed. Decoding is `engine`'s, the live view is `watch`'s.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.console import is_live, make_console, pick_device, visible
from unmask.errors import RequestError

if TYPE_CHECKING:
    from unmask.engine.completion import OnStep
    from unmask.engine.model import Generation

DIFFUSION_MODEL = "smollm2-135m-diffusion"


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads it from standard input.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, Hugging Face id or embedded model.")] = DIFFUSION_MODEL,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    block_size: Annotated[int | None, typer.Option(help="Tokens denoised together; left out: the model's.")] = None,
    threshold: Annotated[float, typer.Option(help="Accept every token more probable than this.")] = 0.95,
    steps: Annotated[int | None, typer.Option(help="Most steps per block; left out: the block size.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; left out: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this mass; left out: all.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws at a temperature above 0.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as plain text, without the chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    watch: Annotated[bool, typer.Option("--watch", help="Show the blocks while they are denoised.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: the text and what it cost.")] = False,
) -> None:
    """Answer a prompt.

    A diffusion model answers block by block, an autoregressive one token by token.

    \b
    unmask generate "What is the capital of France?" --watch
    unmask generate "Tell me a story." --temperature 0.8 --top-p 0.95 --seed 7
    cat question.txt | unmask generate - --model out/mine --json

    A lower --threshold accepts more tokens per step: faster, less careful.
    """
    text = _read_stdin() if prompt == "-" else prompt

    import unmask
    from unmask.cli.watch import costs, show

    language_model = unmask.load(model, dtype=dtype, device=pick_device(device))

    def answer(on_step: OnStep | None) -> Generation:
        return language_model.generate(
            text,
            max_new_tokens=max_new_tokens,
            chat=False if raw else None,
            block_size=block_size,
            threshold=threshold,
            steps=steps,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            on_step=on_step,
        )

    console = make_console(stderr=as_json)
    generation = show(console, language_model, max_new_tokens, answer) if watch else answer(None)
    if as_json:
        typer.echo(json.dumps(generation.to_json()))
        return
    if not watch:
        typer.echo(visible(generation.text) if sys.stdout.isatty() else generation.text)
    if sys.stderr.isatty() and not (watch and is_live(console)):
        make_console(stderr=True).print(costs(generation), style="dim")


def _read_stdin() -> str:
    """The prompt on standard input, less the newline that ends its last line."""
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on standard input is not UTF-8 ({error.reason}); convert it") from error
    if not text.strip():
        raise RequestError("the prompt on standard input is empty; pipe some text in, or name it instead of -")
    return text.removesuffix("\n")
