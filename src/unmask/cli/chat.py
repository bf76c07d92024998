"""`unmask chat`: a conversation in the terminal.

Owns the command line options, how messages are read, and what Ctrl-C does at the prompt. `chat_session` carries out messages
and commands; `chat_local` and `chat_remote` make the replies.
"""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli.chat_session import ChatSession, note
from unmask.cli.console import is_live, make_console
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.cli.chat_session import Responder
    from unmask.engine.llm import LanguageModel

_PROMPT, _MORE = "> ", ". "
_FENCE = '"""'


@options.with_sampling_options(surface="set")
def chat(
    params: SamplingParams,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder, Hugging Face id or embedded model; with --url, one of the server's. "
            f"[default: {options.DIFFUSION_MODEL}; the server's first]",
            rich_help_panel="Model",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Talk to the OpenAI-compatible server at this address.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="UNMASK_API_KEY", help="API key for the server at --url.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = "auto",
    lora: options.Lora = None,
    watch: Annotated[
        bool, typer.Option("--watch/--no-watch", help="Show the blocks while they are denoised.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Talk with a model, in this process or on a server.

    Answers appear as they become final. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice, leaves.

    \b
    unmask chat --watch
    unmask chat --model out/mine --system "Answer in one sentence." --temperature 0.7
    unmask chat --url http://127.0.0.1:8000
    printf '%s\\n' "My name is Ada." "What is my name?" | unmask chat

    /help lists what can be typed besides messages, such as /undo, /save FILE and /set threshold 0.7.
    """
    is_interactive = sys.stdin.isatty()
    if url is None:
        language_model = options.load(model or options.DIFFUSION_MODEL, dtype, device, quantize, lora=lora)
        responder = _local(language_model, watch=watch, is_interactive=is_interactive)
    elif watch or lora is not None or (dtype, device, quantize) != ("auto", "auto", "auto"):
        raise ConfigError("--watch, --dtype, --device, --quantize and --lora are for a model in this process; not with --url")
    else:
        from unmask.cli.chat_remote import RemoteResponder

        responder = RemoteResponder(url, key=api_key or None, model=model, interruptible=is_interactive)
    session = ChatSession(responder, params, system)
    if is_interactive:
        note(f"{responder.about}; /help lists the commands, Ctrl-D leaves")
    converse(session, is_interactive=is_interactive)
    if session.has_failed and not is_interactive:
        raise typer.Exit(1)


def _local(language_model: LanguageModel, *, watch: bool, is_interactive: bool) -> Responder:
    from unmask.cli.chat_local import LocalResponder

    console = make_console()
    return LocalResponder(language_model, console if watch and is_live(console) else None, interruptible=is_interactive)


def converse(session: ChatSession, *, is_interactive: bool) -> None:
    """Take messages until the input ends, or until Ctrl-C is pressed twice at the prompt."""
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    was_interrupted = False
    while True:
        try:
            text = _read(is_interactive and sys.stdout.isatty())
            was_interrupted = False
            if text.strip():
                session.take(text)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            if was_interrupted:
                return
            was_interrupted = True
            note("\npress Ctrl-C again, or Ctrl-D, to leave")


def _read(with_prompt: bool) -> str:
    """A message: one line, lines continued with a backslash, or the lines between two fences.

    Raises:
        EOFError: the input has ended.
    """
    prompt, more = (_PROMPT, _MORE) if with_prompt else ("", "")
    lines = [input(prompt)]
    # The end of the input within a message ends the message.
    with contextlib.suppress(EOFError):
        if lines[0].strip() == _FENCE:
            del lines[0]
            while (line := input(more)).strip() != _FENCE:
                lines.append(line)
        else:
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1].removesuffix("\\")
                lines.append(input(more))
    return "\n".join(lines)
