"""A conversation in a terminal: what has been said, and the commands that change it.

Owns the messages, the options and what is printed about them. Knows neither an engine nor a connection: it is handed
something that answers. Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import typer

from unmask.cli.console import make_console, visible
from unmask.errors import ConfigError, DataError, RequestError, UnmaskError

Message = dict[str, str]
Write = Callable[[str], None]
End = Literal["stop", "length", "context", "interrupted", "lost"]


def _yes_or_no(word: str) -> bool:
    if word.lower() not in ("yes", "no", "true", "false", "on", "off"):
        raise ValueError(word)
    return word.lower() in ("yes", "true", "on")


SETTINGS: Mapping[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "block_size": int,
    "threshold": float,
    "steps": int,
    "preset": str,
    "edit_threshold": float,
    "speculative": _yes_or_no,
    "policy": str,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
}
_ROLES = ("system", "user", "assistant")
_NOTES: Mapping[End, str] = {
    "length": "cut: the answer has spent its tokens; /set max_new_tokens allows more",
    "context": "cut: the context is full; /undo takes back the last exchange, /reset starts over (/save it first)",
    "interrupted": "stopped; what came is kept: go on, /retry it, or /undo it",
}


@dataclass(frozen=True)
class Answer:
    """What came, why no more came, and what it cost as far as that is known.

    Attributes:
        text: all that was shown and is final.
        end: the model ended it, the budget or the context is spent, the user stopped it, or the connection broke.
        seconds: from the question to the end.
        tokens: of the answer.
        forwards: of the model, for it.
        prompt_tokens: of the conversation before it.
        cached_tokens: how many of those were found in the cache.
        problem: one line on what broke.
        drawn: a live view has shown the text and what it cost.
    """

    text: str
    end: End
    seconds: float
    tokens: int | None = None
    forwards: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    problem: str | None = None
    drawn: bool = False


class Answerer(Protocol):
    """Answers conversations; `about` says in some words who it is."""

    about: str

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise RequestError for an option that is wrong whatever is asked."""

    def answer(self, messages: Sequence[Message], options: Mapping[str, Any], attempt: int, write: Write) -> Answer:
        """Answer the last message, handing out final text through `write`; each `attempt` draws differently.

        Raises:
            UnmaskError: nothing has come.
        """


class Conversation:
    """Messages and options, and the commands on them.

    A message that got no answer stays: /retry asks it again, the next message takes its place.

    Args:
        answerer: who answers.
        options: of decoding; those left out are the answerer's.
        system: the system prompt.
    """

    def __init__(self, answerer: Answerer, options: Mapping[str, Any], system: str | None) -> None:
        answerer.check(options)
        self._answerer, self._options = answerer, dict(options)
        self._messages: list[Message] = [] if not system else [{"role": "system", "content": system}]
        self._answers: list[Answer] = []
        self._attempt = 0
        self.has_failed = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "system": ("TEXT", "the system prompt from here on; without TEXT: none", self._system),
            "reset": ("", "forget the conversation; the system prompt and an unanswered message stay", self._reset),
            "undo": ("", "take back the last message and its answer", self._undo),
            "retry": ("", "answer the last message again (another answer needs a temperature above 0)", self._retry),
            "save": ("FILE", "write the messages as JSON", self._save),
            "load": ("FILE", "go on with saved messages", self._load),
            "set": ("NAME VALUE", f"a decoding option ({', '.join(SETTINGS)}); VALUE none: its default", self._set),
            "stats": ("", "what the conversation has cost", self._stats),
            "quit": ("", "leave, as Ctrl-D does", self._quit),
        }

    def take(self, text: str) -> None:
        """Carry out a command, or answer a message; what goes wrong is said and ends nothing.

        Raises:
            EOFError: /quit.
        """
        try:
            if text.startswith("/"):
                self._command(text)
            else:
                self._drop("user")
                self._messages.append({"role": "user", "content": text})
                self._attempt = 0
                self._answer()
        except UnmaskError as error:
            self._fail(str(error))

    def _command(self, text: str) -> None:
        name, *rest = text[1:].split(maxsplit=1) or [""]
        if name not in self._commands:
            raise ConfigError(f"no command /{name}; /help lists them (a message that begins with / needs a space before it)")
        usage, _, run = self._commands[name]
        if usage in ("FILE",) and not rest:
            raise ConfigError(f"/{name} needs a name: /{name} conversation.json")
        run(rest[0].strip() if rest else "")

    def _answer(self) -> None:
        answer = self._answerer.answer(self._messages, self._options, self._attempt, _write)
        self._answers.append(answer)
        if answer.text and not answer.drawn:
            _write("\n")
        if answer.text or answer.end not in ("interrupted", "lost"):
            self._messages.append({"role": "assistant", "content": answer.text})
        if sys.stderr.isatty() and not answer.drawn:
            make_console(stderr=True).print(costs([answer]), style="dim")
        if answer.problem is not None:
            self._fail(answer.problem)
        elif answer.end in _NOTES:
            note(_NOTES[answer.end])

    def _fail(self, problem: str) -> None:
        self.has_failed = True
        typer.echo(visible(f"error: {' '.join(problem.split())}"), err=True)

    def _drop(self, role: str) -> bool:
        """Take away the last message if it is of this role."""
        is_last = bool(self._messages) and self._messages[-1]["role"] == role
        if is_last:
            self._messages.pop()
        return is_last

    def _help(self, _: str) -> None:
        for name, (usage, text, _run) in self._commands.items():
            note(f"{f'/{name} {usage}':<16} {text}")
        note(
            'a line that ends in \\ goes on in the next, and lines between two """ lines are a message; Ctrl-C stops an answer'
        )

    def _system(self, text: str) -> None:
        turns = [message for message in self._messages if message["role"] != "system"]
        self._messages = ([{"role": "system", "content": text}] if text else []) + turns
        note("the system prompt is set" if text else "there is no system prompt now")

    def _reset(self, _: str) -> None:
        unanswered = [message for message in self._messages[-1:] if message["role"] == "user"]
        self._messages = [message for message in self._messages if message["role"] == "system"] + unanswered
        note("the conversation is forgotten" + (", but for the unanswered message: /retry asks it" if unanswered else ""))

    def _undo(self, _: str) -> None:
        self._drop("assistant")
        if not self._drop("user"):
            raise RequestError("there is no exchange to take back; ask something first")
        note("the last exchange is taken back")

    def _retry(self, _: str) -> None:
        self._drop("assistant")
        if not self._messages or self._messages[-1]["role"] != "user":
            raise RequestError("there is no message to answer again; ask something first")
        self._attempt += 1
        self._answer()

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
        note(f"{len(self._messages)} messages are in {path}")

    def _load(self, name: str) -> None:
        self._messages = read_messages(Path(name).expanduser())
        note(f"{len(self._messages)} messages are loaded; what was said before is forgotten")

    def _set(self, text: str) -> None:
        words = text.replace("=", " ").split()
        if len(words) == 2:
            changed = with_setting(self._options, *words)
            self._answerer.check(changed)
            self._options = changed
        elif words:
            raise ConfigError("/set takes a name and a value: /set threshold 0.7")
        values = [f"{name} {value}" for name, value in self._options.items()]
        note(", ".join(values) or "every option has its default")

    def _stats(self, _: str) -> None:
        note(f"{self._answerer.about}; answers: {len(self._answers)}, {costs(self._answers)}")
        known = [answer for answer in self._answers if answer.prompt_tokens is not None]
        if known:
            cached = "" if known[-1].cached_tokens is None else f", {known[-1].cached_tokens} of them from the cache"
            note(f"the last question was {known[-1].prompt_tokens} tokens with all before it{cached}")

    def _quit(self, _: str) -> None:
        raise EOFError


def costs(answers: Sequence[Answer]) -> str:
    """One line on what answers cost, as far as that is known of every one of them."""
    seconds = sum(answer.seconds for answer in answers)
    tokens, forwards = _total([answer.tokens for answer in answers]), _total([answer.forwards for answer in answers])
    if tokens is None:
        return f"{seconds:.1f} s"
    rate = f"{seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
    if forwards is None:
        return f"{tokens} tokens, {rate}"
    return f"{tokens} tokens in {forwards} forwards ({tokens / max(forwards, 1):.2f} tokens per forward), {rate}"


def with_setting(options: Mapping[str, Any], name: str, word: str) -> dict[str, Any]:
    """Options with one of them changed; "none" leaves it out.

    Raises:
        ConfigError: no such option, or not a value of its type.
    """
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise ConfigError(f"no option {name}; use one of {', '.join(SETTINGS)}")
    others = {key: value for key, value in options.items() if key != name}
    if word == "none":
        return others
    try:
        return {**others, name: SETTINGS[name](word)}
    except ValueError as error:
        kinds: Mapping[Any, str] = {int: "a whole number", _yes_or_no: "yes or no"}
        kind = kinds.get(SETTINGS[name], "a number")
        raise ConfigError(f"{name} is {word!r}; it must be {kind}, or none") from error


def read_messages(path: Path) -> list[Message]:
    """The messages of a saved conversation.

    Raises:
        DataError: unreadable, or not a list of messages.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a file that /save has written") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); name a file that /save has written") from error
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(f"{path} is not a list of messages with role and content; name a file that /save has written")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def note(text: str) -> None:
    """A line about the conversation."""
    typer.echo(visible(text), err=True)


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


def _write(text: str) -> None:
    """Part of an answer, as it is, or made harmless for a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
