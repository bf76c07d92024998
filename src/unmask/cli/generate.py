"""`unmask generate`: answer one prompt.

Owns the options and how the answer is printed. Decoding is `engine`'s, the live view is `watch`'s.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli.console import is_live, make_console, pick_device, visible
from unmask.errors import RequestError

if TYPE_CHECKING:
    from unmask.engine.llm import Generation


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; - reads it from standard input.")],
    model: options.Model = options.DIFFUSION_MODEL,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    min_new_tokens: Annotated[int, typer.Option(help="No end of text before so many tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    block_size: options.BlockSize = None,
    threshold: options.Threshold = None,
    steps: options.Steps = None,
    preset: options.Preset = None,
    edit_threshold: options.EditThreshold = None,
    speculative: options.Speculative = None,
    policy: options.Policy = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    json_schema: Annotated[Path | None, typer.Option(help="The answer is JSON that the schema in this file accepts.")] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this regular expression.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="The answer is a sentence of the Lark grammar in this file.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities, and so many alternatives.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue PROMPT as plain text, without the chat template.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the blocks while they are denoised.")] = False,
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
    wanted = options.given(
        min_new_tokens=min_new_tokens or None,
        stop=stop,
        block_size=block_size,
        threshold=threshold,
        steps=steps,
        preset=preset,
        edit_threshold=edit_threshold,
        speculative=speculative,
        policy=policy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        json_schema=options.read_rules(json_schema, "--json-schema"),
        regex=regex,
        grammar=options.read_rules(grammar, "--grammar"),
        logprobs=logprobs,
    )

    import unmask
    from unmask.cli.watch import show

    language_model = unmask.load(model, dtype=dtype, device=pick_device(device), quantize=quantize)

    chat = False if raw else None
    ask = partial(language_model.generate, text, max_new_tokens=max_new_tokens, chat=chat, **wanted)
    console = make_console(stderr=as_json)
    generation = show(console, language_model, max_new_tokens, lambda on_step: ask(on_step=on_step)) if watch else ask()
    if as_json:
        typer.echo(json.dumps(generation.to_json()))
    else:
        _print_text(generation, shown=watch, live=watch and is_live(console))


def _print_text(generation: Generation, *, shown: bool, live: bool) -> None:
    """The answer, unless it has been shown while it formed, and what it cost, unless the live view said so."""
    from unmask.cli.watch import costs

    if not shown:
        typer.echo(visible(generation.text) if sys.stdout.isatty() else generation.text)
    if sys.stderr.isatty() and not live:
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
