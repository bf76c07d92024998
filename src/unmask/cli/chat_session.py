"""`ChatSession`: messages, decoding options and slash commands of a chat in the terminal.

Owns the messages, the options and what is printed about them. Knows neither an engine nor a connection: a `Responder` makes the
replies. Replies go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import typer

from unmask.cli.console import cost_line, make_console, visible
from unmask.engine.sampling_params import Option, SamplingParams
from unmask.errors import ConfigError, DataError, RequestError, UnmaskError

if TYPE_CHECKING:
    from unmask.data.chat import Message

Write = Callable[[str], None]
EndReason = Literal["stop", "length", "context", "interrupted", "lost"]
_ROLES = ("system", "user", "assistant")
_NOTES: Mapping[EndReason, str] = {
    "length": "cut: max_new_tokens is reached; /set max_new_tokens allows more",
    "context": "cut: the context is full; /undo removes the last exchange, /reset starts over (/save first)",
    "interrupted": "stopped; the text so far is kept: go on, /retry or /undo",
}


@dataclass(frozen=True)
class ChatReply:
    """A reply, why it ended, and what it cost as far as that is known.

    Attributes:
        text: all final text; it has been written out already.
        end: `stop`: by the model; `length`: at max_new_tokens; `context`: the context is full; `interrupted`: by the user;
            `lost`: the connection broke.
        seconds: from the question to the end.
        tokens: of the reply.
        forwards: of the model.
        prompt_tokens: of the conversation before the reply.
        cached_tokens: how many of those were in the KV cache.
        error: one line on what broke.
        shown_live: a live view has shown the text and what it cost.
    """

    text: str
    end: EndReason
    seconds: float
    tokens: int | None = None
    forwards: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None
    shown_live: bool = False


class Responder(Protocol):
    """Makes the replies; `about` describes it in a few words."""

    about: str

    def check(self, params: SamplingParams) -> None:
        """Raise RequestError for an option that is wrong for every message."""

    def reply(self, messages: Sequence[Message], params: SamplingParams, attempt: int, write: Write) -> ChatReply:
        """Reply to the last message and pass final text to `write`; each `attempt` samples differently.

        Raises:
            UnmaskError: there is no reply.
        """


class ChatSession:
    """Messages, decoding options and the commands on them.

    A message without a reply stays: /retry sends it again, the next message replaces it.

    Args:
        responder: makes the replies.
        params: decoding options; those not given have the responder's defaults.
        system: system prompt.
    """

    def __init__(self, responder: Responder, params: SamplingParams, system: str | None) -> None:
        responder.check(params)
        self._responder, self._params = responder, params
        self._messages: list[Message] = [] if not system else [{"role": "system", "content": system}]
        self._replies: list[ChatReply] = []
        self._attempt = 0
        self.has_failed = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "list the commands", self._help),
            "system": ("TEXT", "set the system prompt; without TEXT: none", self._system),
            "reset": ("", "forget the conversation, except the system prompt and an unanswered message", self._reset),
            "undo": ("", "remove the last message and its answer", self._undo),
            "retry": ("", "answer the last message again (differs only with temperature above 0)", self._retry),
            "save": ("FILE", "save the messages as JSON", self._save),
            "load": ("FILE", "continue with saved messages", self._load),
            "set": ("NAME VALUE", "change a decoding option; VALUE none: its default; without NAME: list all", self._set),
            "stats": ("", "show what the conversation has cost", self._stats),
            "quit": ("", "leave (or Ctrl-D)", self._quit),
        }

    def take(self, text: str) -> None:
        """Carry out a command or answer a message; errors are printed and do not end the session.

        Raises:
            EOFError: /quit.
        """
        try:
            if text.startswith("/"):
                self._command(text)
            else:
                self._pop("user")
                self._messages.append({"role": "user", "content": text})
                self._attempt = 0
                self._reply()
        except UnmaskError as error:
            self._fail(str(error))

    def _command(self, text: str) -> None:
        name, *rest = text[1:].split(maxsplit=1) or [""]
        if name not in self._commands:
            raise ConfigError(f"no command /{name}; /help lists them (a message that begins with / needs a space before it)")
        usage, _, run = self._commands[name]
        if usage == "FILE" and not rest:
            raise ConfigError(f"/{name} needs a name: /{name} conversation.json")
        run(rest[0].strip() if rest else "")

    def _reply(self) -> None:
        reply = self._responder.reply(self._messages, self._params, self._attempt, _write)
        self._replies.append(reply)
        if reply.text and not reply.shown_live:
            _write("\n")
        if reply.text or reply.end not in ("interrupted", "lost"):
            self._messages.append({"role": "assistant", "content": reply.text})
        if sys.stderr.isatty() and not reply.shown_live:
            make_console(stderr=True).print(costs([reply]), style="dim")
        if reply.error is not None:
            self._fail(reply.error)
        elif reply.end in _NOTES:
            note(_NOTES[reply.end])

    def _fail(self, message: str) -> None:
        self.has_failed = True
        typer.echo(visible(f"error: {' '.join(message.split())}"), err=True)

    def _pop(self, role: str) -> bool:
        """Remove the last message if it has this role."""
        is_last = bool(self._messages) and self._messages[-1]["role"] == role
        if is_last:
            self._messages.pop()
        return is_last

    def _help(self, _: str) -> None:
        for name, (usage, text, _run) in self._commands.items():
            note(f"{f'/{name} {usage}':<16} {text}")
        note('a line that ends in \\ continues on the next; lines between two """ lines are one message; Ctrl-C ends an answer')

    def _system(self, text: str) -> None:
        turns = [message for message in self._messages if message["role"] != "system"]
        self._messages = ([{"role": "system", "content": text}] if text else []) + turns
        note("the system prompt is set" if text else "there is no system prompt now")

    def _reset(self, _: str) -> None:
        unanswered = [message for message in self._messages[-1:] if message["role"] == "user"]
        self._messages = [message for message in self._messages if message["role"] == "system"] + unanswered
        note("the conversation is forgotten" + (", except the unanswered message (/retry sends it)" if unanswered else ""))

    def _undo(self, _: str) -> None:
        self._pop("assistant")
        if not self._pop("user"):
            raise RequestError("there is no exchange to remove; send a message first")
        note("the last exchange is removed")

    def _retry(self, _: str) -> None:
        self._pop("assistant")
        if not self._messages or self._messages[-1]["role"] != "user":
            raise RequestError("there is no message to answer again; send one first")
        self._attempt += 1
        self._reply()

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if path.exists():
            try:
                read_messages(path)
            except DataError as error:
                raise DataError(f"{path} exists and is not a saved conversation; choose another name") from error
        try:
            path.write_text(json.dumps(self._messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror}); choose another name") from error
        note(f"{len(self._messages)} messages are saved in {path}")

    def _load(self, name: str) -> None:
        self._messages = read_messages(Path(name).expanduser())
        note(f"{len(self._messages)} messages are loaded and replace the conversation")

    def _set(self, text: str) -> None:
        words = text.replace("=", " ").split()
        if len(words) == 2:
            changed = with_option(self._params, *words)
            self._responder.check(changed)
            self._params = changed
        elif words:
            raise ConfigError("/set takes a name and a value: /set threshold 0.7")
        given = self._params.given()
        for name, option in settable_options().items():
            if not words:
                note(f"{name:<16} {given.get(name, f'[default: {option.shown_default}]')}")
            elif name in given:
                note(f"{name} {given[name]}")

    def _stats(self, _: str) -> None:
        note(f"{self._responder.about}; answers: {len(self._replies)}, {costs(self._replies)}")
        known = [reply for reply in self._replies if reply.prompt_tokens is not None]
        if known:
            cached = "" if known[-1].cached_tokens is None else f", {known[-1].cached_tokens} of them in the KV cache"
            note(f"the last prompt had {known[-1].prompt_tokens} tokens, conversation included{cached}")

    def _quit(self, _: str) -> None:
        raise EOFError


def costs(replies: Sequence[ChatReply]) -> str:
    """One line on what replies cost together; a number that is unknown for one of them is left out."""
    tokens, forwards = _total([reply.tokens for reply in replies]), _total([reply.forwards for reply in replies])
    return cost_line(tokens, forwards, sum(reply.seconds for reply in replies))


def settable_options() -> dict[str, Option]:
    """Decoding options that /set changes, by name."""
    return {name: option for name, option in SamplingParams.options().items() if "set" in option.surfaces}


def with_option(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """Decoding options with one of them changed; "none" gives it its default back.

    Raises:
        RequestError: no such option, or not a value of its type and range.
    """
    options, name = settable_options(), name.replace("-", "_")
    if name not in options:
        raise RequestError(f"no option {name}; use one of {', '.join(options)}")
    return params.replace(**{name: options[name].default if text == "none" else options[name].parse(text)})


def read_messages(path: Path) -> list[Message]:
    """The messages of a saved conversation.

    Raises:
        DataError: unreadable, or not a list of messages.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a file written by /save") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); name a file written by /save") from error
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(f"{path} is not a list of messages with role and content; name a file written by /save")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def note(text: str) -> None:
    """Print a line about the session on standard error."""
    typer.echo(visible(text), err=True)


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


def _write(text: str) -> None:
    """Write part of a reply; in a terminal, without control characters."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
