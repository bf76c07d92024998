"""`unmask generate`: answer one prompt.

Owns the options and how the answer is printed. Decoding is `engine`'s, the live view is `watch`'s.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli.console import is_live, make_console, visible
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import RequestError

if TYPE_CHECKING:
    from unmask.engine.generation import Generation


@options.with_sampling_options()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads it from standard input.")],
    params: SamplingParams,
    model: options.Model = options.DIFFUSION_MODEL,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as plain text, without the chat template.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = "auto",
    expert_capacity: options.ExpertCapacity = None,
    lora: options.Lora = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the blocks while they are denoised.", rich_help_panel="Output")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Answer a prompt.

    A diffusion model answers block by block, an autoregressive one token by token.

    \b
    unmask generate "What is the capital of France?" --watch
    unmask generate "Tell me a story." --temperature 0.8 --top-p 0.95 --seed 7
    unmask generate "Describe Ada Lovelace." --json-schema person.json
    cat question.txt | unmask generate - --model out/mine --json

    A lower --threshold accepts more tokens per step: faster, less careful.
    """
    text = _read_stdin() if prompt == "-" else prompt
    language_model = options.load(model, dtype, device, quantize, expert_capacity, lora)
    chat = False if raw else None
    ask = partial(language_model.generate, text, params, chat=chat)
    live = False
    if watch:
        from unmask.cli.watch import show

        console, budget = make_console(stderr=as_json), params.resolve(language_model.config).max_new_tokens
        live = is_live(console)
        ids = language_model.encode_prompt(text, chat=chat)
        generation = show(console, language_model, ids, budget, lambda on_step: ask(on_step=on_step))
    else:
        generation = ask()
    if as_json:
        typer.echo(json.dumps(generation.to_json()))
    else:
        _print_text(generation, shown=watch, live=live)


def _print_text(generation: Generation, *, shown: bool, live: bool) -> None:
    """The answer, unless it has been shown while it formed, and what it cost, unless the live view said so."""
    if not shown:
        typer.echo(visible(generation.text) if sys.stdout.isatty() else generation.text)
    if sys.stderr.isatty() and not live:
        from unmask.cli.watch import costs

        make_console(stderr=True).print(costs(generation), style="dim")


def _read_stdin() -> str:
    """The prompt on standard input, less the newline that ends its last line."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on standard input is not UTF-8 ({error.reason}); convert it") from error
    if not text.strip():
        raise RequestError("the prompt on standard input is empty; pipe some text in, or name it instead of -")
    return text.removesuffix("\n")
