"""`unmask chat`: turns, commands, interrupts and failures, with a tiny model in this process and with a small server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import unmask
from helpers import TtyStream, assert_names, example_of, params_of_calls, refused
from unmask.cli import chat as verb
from unmask.cli import chat_session
from unmask.cli.chat_local import LocalResponder
from unmask.cli.chat_session import ChatReply, ChatSession
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.sampling_params import Option, SamplingParams

PLAIN = ("--dtype", "float32", "--device", "cpu", "--quantize", "none")
SHORT = (*PLAIN, "--max-new-tokens", 24)


@pytest.fixture
def model(diffusion_folder: Path) -> LanguageModel:
    return unmask.load(diffusion_folder, dtype="float32")


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is a letter: a random model says mostly halves of characters, which are held back."""
    monkeypatch.setattr(
        "unmask.data.tokenizer.Tokenizer.decode", lambda self, ids, **options: "".join(chr(97 + token % 26) for token in ids)
    )


def reply(model: LanguageModel, turns: Sequence[str], *, system: str | None = None, tokens: int = 24, **options: Any) -> str:
    """The answer to the last of these turns (user, assistant, user ...), from an engine that has seen nothing."""
    assert model.tokenizer is not None
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    ids = model.tokenizer.chat(messages, add_generation_prompt=True)
    return model.tokenizer.decode(model.generate_ids(ids, max_new_tokens=tokens, **options))


def typed(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


# In this process.


def test_an_adapter_is_applied(run, fails, diffusion_folder: Path, adapter: Path, adapted: LanguageModel) -> None:
    result = run("chat", "-m", diffusion_folder, "--lora", adapter, *SHORT, input=typed("Hello"))
    assert (result.exit_code, result.stdout) == (0, reply(adapted, ["Hello"]) + "\n")
    fails("chat", "--url", "http://127.0.0.1:1", "--lora", adapter, names=["--lora", "--url"])


@pytest.mark.parametrize("watch", [(), ("--watch",)])
def test_every_line_of_a_pipe_is_a_turn(run, folder: Path, watch: tuple[str, ...]) -> None:
    model = unmask.load(folder, dtype="float32")
    first = reply(model, ["Hello"], system="Be brief.")
    second = reply(model, ["Hello", first, "What is 2 + 3?"], system="Be brief.")
    assert second != reply(model, ["What is 2 + 3?"], system="Be brief.")
    result = run(
        "chat", "-m", folder, "--system", "Be brief.", *SHORT, *watch, input=typed("Hello", "", "  ", "What is 2 + 3?")
    )
    assert (result.exit_code, result.stdout) == (0, f"{first}\n{second}\n")
    assert "> " not in result.stdout
    assert {line[:4] for line in result.stderr.splitlines()} <= {"cut:"}


def test_the_next_turn_finds_the_last_one_in_the_cache(run, folder: Path) -> None:
    result = run(
        "chat", "-m", folder, *SHORT, input=typed("The quick brown fox jumps over the lazy dog. " * 2, "And?", "/stats")
    )
    found = re.search(r"(\d+) tokens, conversation included, (\d+) of them in the KV cache", result.stderr)
    assert found is not None, result.stderr
    assert 32 <= int(found[2]) < int(found[1])


@pytest.mark.usefixtures("letters")
def test_text_is_handed_out_as_it_becomes_final(model: LanguageModel) -> None:
    written: list[str] = []
    responder = LocalResponder(model, None, interruptible=False)
    answer = responder.reply([{"role": "user", "content": "Hello"}], SamplingParams(max_new_tokens=24), 0, written.append)
    assert len(written) > 3
    assert "".join(written) == answer.text == reply(model, ["Hello"])
    whole = model.generate("Hello", max_new_tokens=24)
    assert (answer.tokens, answer.forwards, answer.prompt_tokens) == (24, whole.forwards, whole.prompt_tokens)
    assert (answer.end, answer.cached_tokens, answer.shown_live) == ("length", 0, False)


def test_the_live_view_is_used_in_a_terminal(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = TtyStream()
    responder = LocalResponder(model, Console(file=terminal, markup=False, force_terminal=True, width=60), interruptible=True)
    written: list[str] = []
    answer = responder.reply([{"role": "user", "content": "Hello"}], SamplingParams(max_new_tokens=24), 0, written.append)
    assert (answer.text, answer.shown_live, written) == (reply(model, ["Hello"]), True, [])
    assert terminal.getvalue().count("tokens per forward") > (answer.forwards or 0)


@pytest.mark.parametrize("option", chat_session.settable_options().values(), ids=lambda option: option.name)
def test_each_option_is_passed_on(run, diffusion_folder: Path, monkeypatch: pytest.MonkeyPatch, option: Option) -> None:
    seen = params_of_calls(monkeypatch, "request")
    text, value = example_of(option)
    others = ["--edit-threshold", 0.5] if option.name == "window" else []
    flags = [f"--{option.name.replace('_', '-')}", *([] if option.kind is bool else [text])]
    run("chat", "-m", diffusion_folder, *PLAIN, *flags, *others, input="Hello\n")
    assert getattr(seen[0], option.name) == value


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--threshold", 1.5), ("--threshold", 1.5)),
        (("--max-new-tokens", 0), ("--max-new-tokens", 0)),
        (("--block-size", 0), ("--block-size", 0)),
        (("--preset", "turbo"), ("--preset", "'turbo'")),
        (("--device", "abacus"), ("device", "'abacus'")),
    ],
)
def test_bad_options_end_it_before_the_first_message(
    fails, diffusion_folder: Path, options: tuple[object, ...], names: tuple[object, ...]
) -> None:
    fails("chat", "-m", diffusion_folder, "--quantize", "none", *options, input="Hello\n", names=names)


def test_a_model_without_a_chat_template(fails, own_folder: Path) -> None:
    config = own_folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    (own_folder / "chat_template.jinja").unlink(missing_ok=True)
    fails("chat", "-m", own_folder, *PLAIN, input="Hello\n", names=["chat template"])


def test_commands_change_the_conversation(run, model: LanguageModel, diffusion_folder: Path, tmp_path: Path) -> None:
    saved = [tmp_path / f"{i}.json" for i in range(4)]
    first, brief = reply(model, ["Hello"]), reply(model, ["Hello", reply(model, ["Hello"]), "And?"], system="Be brief.")
    lines = ["Hello", f"/save {saved[0]}", "/system Be brief.", "And?", f"/save {saved[1]}", "/undo", f"/save {saved[2]}"]
    lines += ["/reset", "/system", f"/save {saved[3]}", f"/load {saved[0]}", "/system Be brief.", "And?"]
    result = run("chat", "-m", diffusion_folder, *SHORT, input=typed(*lines))
    assert (result.exit_code, result.stdout) == (0, f"{first}\n{brief}\n{brief}\n")
    contents = [json.loads(path.read_text()) for path in saved]
    hello = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first}]
    system = {"role": "system", "content": "Be brief."}
    assert contents[0] == hello
    assert contents[1] == [system, *hello, {"role": "user", "content": "And?"}, {"role": "assistant", "content": brief}]
    assert contents[2:] == [[system, *hello], []]


def test_retry_draws_again_and_replaces_the_answer(run, model: LanguageModel, diffusion_folder: Path, tmp_path: Path) -> None:
    drawn = [reply(model, ["Hello"], temperature=1.0, seed=5, sample=sample) for sample in range(3)]
    assert len(set(drawn)) == 3
    options = ("--temperature", 1, "--seed", 5)
    lines = typed("Hello", "/retry", "/retry", f"/save {tmp_path / 'it.json'}", "/undo", "Hello")
    result = run("chat", "-m", diffusion_folder, *SHORT, *options, input=lines)
    assert result.stdout == "".join(f"{text}\n" for text in [*drawn, drawn[0]])
    assert [message["content"] for message in json.loads((tmp_path / "it.json").read_text())] == ["Hello", drawn[2]]


def test_set_changes_an_option_unless_it_is_wrong(run, model: LanguageModel, diffusion_folder: Path) -> None:
    lines = ["/set max-new-tokens=5", "/set threshold 2", "/set top_k x", "/set colour 3", "/set seed", "Hello", "/set"]
    result = run("chat", "-m", diffusion_folder, *SHORT, input=typed(*lines, "/undo", "/set max_new_tokens 24", "Hello"))
    assert result.stdout == f"{reply(model, ['Hello'], tokens=5)}\n{reply(model, ['Hello'])}\n"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert [error.split()[1] for error in errors] == ["threshold", "top_k", "no", "/set"]
    assert "whole number" in errors[1]
    assert result.stderr.splitlines().count("max_new_tokens 5") == 1
    assert "max_new_tokens   5" in result.stderr
    assert result.exit_code == 1
    run("chat", "-m", diffusion_folder, *SHORT, input=typed("/set max_new_tokens none", "/quit", "Hello"))


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("On", True), ("no", False), ("false", False)])
def test_a_switch_is_set_by_yes_or_no(word: str, value: bool) -> None:
    changed = chat_session.with_option(SamplingParams(seed=1), "prompt_lookup", word)
    assert changed == SamplingParams(seed=1, prompt_lookup=value)
    assert chat_session.with_option(changed, "prompt_lookup", "none") == SamplingParams(seed=1)
    with refused(unmask.UnmaskError, "prompt_lookup", "'0'"):
        chat_session.with_option(SamplingParams(), "prompt_lookup", "0")


def test_set_alone_lists_every_option_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    ChatSession(Parrot(), SamplingParams(top_k=3), None).take("/set")
    lines = capsys.readouterr().err.splitlines()
    options = chat_session.settable_options()
    assert [line.split()[0] for line in lines] == list(options)
    for line in lines:
        name, _, value = line.partition(" ")
        assert value.strip() == ("3" if name == "top_k" else f"[default: {options[name].shown_default}]")


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("/nope", ("/nope", "/help")),
        ("/", ("/help",)),
        ("/undo", ("exchange",)),
        ("/retry", ("message",)),
        ("/save", ("/save", "name")),
        ("/load nowhere.json", ("nowhere.json",)),
        ("/load text.txt", ("text.txt", "JSON")),
        ("/load numbers.json", ("numbers.json", "messages")),
        ("/save text.txt", ("text.txt",)),
        ("/save no/such/folder.json", ("no/such/folder.json",)),
    ],
)
def test_a_wrong_command_is_one_line_and_ends_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, names: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("dear diary")
    Path("numbers.json").write_text('[{"role": "user", "content": 3}]')
    session = ChatSession(Parrot(), SamplingParams(), None)
    session.take(line)
    assert session.has_failed
    error = capsys.readouterr().err
    assert_names(error, *names)
    assert error.count("\n") == 1
    assert Path("text.txt").read_text() == "dear diary"
    session.take("still here?")
    assert capsys.readouterr().out == "still here?\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    ChatSession(Parrot(), SamplingParams(), None).take("/help")
    listed = re.findall(r"^/(\w+)", capsys.readouterr().err, re.MULTILINE)
    assert listed == ["help", "system", "reset", "undo", "retry", "save", "load", "set", "stats", "quit"]


def test_a_conversation_that_no_longer_fits_says_so_and_loses_nothing(
    run, model: LanguageModel, diffusion_folder: Path
) -> None:
    long = "7" * 140
    lines = [long, long, "/reset", "/retry", "Hi"]
    result = run("chat", "-m", diffusion_folder, *PLAIN, "--max-new-tokens", 8, input=typed(*lines))
    match = re.search(r"error: the conversation has (\d+) tokens and the context holds 256: .*/reset", result.stderr)
    assert match is not None, result.stderr
    assert int(match[1]) >= 256
    once = reply(model, [long], tokens=8)
    assert result.stdout == f"{once}\n{once}\n{reply(model, [long, once, 'Hi'], tokens=8)}\n"
    assert result.exit_code == 1


def test_an_answer_takes_what_room_the_context_has(run, diffusion_folder: Path) -> None:
    result = run("chat", "-m", diffusion_folder, *PLAIN, "--ignore-eos", input=typed("Hello", "/stats"))
    assert result.exit_code == 0
    assert "cut: the context is full; " in result.stderr
    prompt = int(re.findall(r"(\d+) tokens, conversation included", result.stderr)[0])
    assert int(re.findall(r"answers: 1, (\d+) tokens", result.stderr)[0]) == 256 - prompt


@pytest.mark.parametrize(
    ("given", "passed"), [((), "auto"), (("--quantize", "none"), "none"), (("--quantize", "int4"), "int4")]
)
def test_the_weights_that_were_asked_for_are_loaded(
    run, ar_folder: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], passed: str
) -> None:
    asked: list[object] = []
    load = unmask.load

    def plain_load(model: str, *, quantize: str, **options: Any) -> LanguageModel:
        asked.append(quantize)
        return load(model, quantize="none", **options)

    monkeypatch.setattr("unmask.load", plain_load)
    assert run("chat", "-m", ar_folder, *given, input="").exit_code == 0
    assert asked == [passed]


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_answer_and_keeps_what_came(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], times: int
) -> None:
    plain, steps = Engine.step, []

    def step(self: Engine) -> Any:
        steps.append(self)
        if len(steps) == 6:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return plain(self)

    whole = reply(model, ["Hello"], tokens=48)
    monkeypatch.setattr(Engine, "step", step)
    handler = signal.getsignal(signal.SIGINT)
    responder = LocalResponder(model, None, interruptible=True)
    session = ChatSession(responder, SamplingParams(max_new_tokens=48), None)
    session.take("Hello")
    assert signal.getsignal(signal.SIGINT) is handler
    kept = capsys.readouterr()
    assert kept.out.endswith("\n")
    assert "stopped; the text so far is kept" in kept.err
    assert 0 < len(kept.out) - 1 < len(whole)
    assert whole.startswith(kept.out[:-1])
    assert len(steps) == 6
    session.take("And?")
    assert (steps[-1] is steps[0]) == (times == 1), "after a hard stop the engine is a new one"
    assert capsys.readouterr().out == reply(model, ["Hello", kept.out[:-1], "And?"], tokens=48) + "\n"
    assert not steps[-1].has_work
    assert not session.has_failed


def test_ctrl_c_ends_the_program_when_messages_come_from_a_pipe(run, diffusion_folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "step", lambda self: signal.raise_signal(signal.SIGINT))
    assert run("chat", "-m", diffusion_folder, *SHORT, input="Hello\n").exit_code == 130


# At the prompt.


class Parrot:
    """Repeats the last message."""

    about = "parrot"

    def check(self, params: SamplingParams) -> None:
        pass

    def reply(self, messages: Any, params: SamplingParams, attempt: int, write: Callable[[str], None]) -> ChatReply:
        text = messages[-1]["content"]
        write(text)
        return ChatReply(text, "stop", 1.0)


def converse(monkeypatch: pytest.MonkeyPatch, events: Sequence[str | BaseException], *, interactive: bool = True) -> list[str]:
    """Feed the loop with lines and interrupts; the messages it took."""
    left, taken = list(events), []

    def fake_input(prompt: str) -> str:
        event = left.pop(0) if left else EOFError()
        if isinstance(event, str):
            return event
        raise event

    class Recorder(ChatSession):
        def take(self, text: str) -> None:
            taken.append(text)

    monkeypatch.setattr("builtins.input", fake_input)
    verb.converse(Recorder(Parrot(), SamplingParams(), None), is_interactive=interactive)
    return taken


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", " b "], ["a", " b "]),
        (["a\\", "b\\", "c", "d"], ["a\nb\nc", "d"]),
        (['"""', "def f():", "    return 1\\", "", '"""', "d"], ["def f():\n    return 1\\\n", "d"]),
        (['"""', "a", "b"], ["a\nb"]),
        (["a\\"], ["a"]),
        (["", "  ", '"""', '"""'], []),
    ],
)
def test_lines_become_messages(monkeypatch: pytest.MonkeyPatch, lines: list[str], messages: list[str]) -> None:
    assert converse(monkeypatch, lines) == messages
    assert converse(monkeypatch, lines, interactive=False) == messages


def test_ctrl_c_leaves_when_it_comes_twice_in_a_row(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    stop = KeyboardInterrupt()
    assert converse(monkeypatch, [stop, "a", stop, "b", '"""', "half", stop, "c", stop, stop, "d"]) == ["a", "b", "c"]
    assert capsys.readouterr().err.count("Ctrl-C again, or Ctrl-D, to leave") == 4
    with pytest.raises(KeyboardInterrupt):
        converse(monkeypatch, [stop], interactive=False)


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    session = ChatSession(Parrot(), SamplingParams(), None)
    session.take("\x1b[2Ja\tb")
    assert capsys.readouterr().out == "\x1b[2Ja\tb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    session.take("\x1b[2Ja\tb")
    assert capsys.readouterr().out == "\ufffd[2Ja\tb\n"
    session.take("/\x1b[2J")
    assert "\x1b" not in capsys.readouterr().err


def test_input_that_is_not_utf8_ends_nothing(run, diffusion_folder: Path) -> None:
    result = run("chat", "-m", diffusion_folder, *SHORT, input=b"\xff\xfe?\n")
    assert result.exit_code == 0, result.output
    assert result.stdout


# With a server.

OK = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}]}


class Server:
    """Serves prepared answers, one a request: a list of chunks (bytes: as they are; None: the connection breaks; a float: a
    pause) or a status and a body."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                assert self.path == "/v1/models"
                self.send(200, {"data": [{"id": "first"}, {"id": "second"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                assert self.path == "/v1/chat/completions"
                server.requests.append((dict(self.headers), body))
                answer = server.answers.pop(0) if server.answers else [delta("ok"), OK, b"data: [DONE]\n\n"]
                if isinstance(answer, tuple):
                    self.send(*answer)
                    return
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.stream(answer)

            def stream(self, chunks: list[Any]) -> None:
                for chunk in chunks:
                    if chunk is None:
                        # A reset instead of an orderly end.
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        self.connection.close()
                        return
                    if isinstance(chunk, float):
                        time.sleep(chunk)
                        continue
                    self.wfile.write(chunk if isinstance(chunk, bytes) else f"data: {json.dumps(chunk)}\n\n".encode())

            def send(self, status: int, body: Any) -> None:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


def test_a_server_is_sent_the_conversation_and_its_stream_is_shown(run, server: Server) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 6}}
    cost = {**OK, "diffusion": {"forwards": 3, "cached_tokens": 4}}
    server.answers = [[b": hello\n\n", delta(""), delta("Par"), delta("is."), cost, usage, b"data: [DONE]\n\n"]]
    result = run("chat", "--url", server.url, "--system", "Be brief.", input=typed("Capital?", "/stats", "And?"))
    assert (result.exit_code, result.stdout) == (0, "Paris.\nok\n")
    assert "6 tokens in 3 forwards (2.00 tokens per forward)" in result.stderr
    assert "12 tokens, conversation included, 4 of them in the KV cache" in result.stderr
    (_, first), (_, second) = server.requests
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital?"}]
    assert first == {"model": "first", "messages": asked, "stream": True, "stream_options": {"include_usage": True}}
    assert second["messages"] == [
        *asked, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And?"},
    ]  # fmt: skip


def test_options_and_the_key_reach_the_server(run, server: Server) -> None:
    options = ("--temperature", 0.5, "--top-p", 0.9, "--seed", 7, "--max-new-tokens", 9, "--top-k", 3, "--threshold", 0.8)
    result = run(
        "chat", "--url", f"{server.url}/v1", "-m", "second", *options,
        input=typed("a", "/retry", "/set threshold none", "/set top_k none", "b"), env={"UNMASK_API_KEY": "secret"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (headers, first), (_, again), (_, last) = server.requests
    standard = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "model": "second"}
    assert first.items() >= {**standard, "seed": 7, "diffusion": {"top_k": 3, "threshold": 0.8}}.items()
    assert (again["seed"], again["messages"]) == (8, first["messages"])
    assert last.items() >= standard.items()
    assert "diffusion" not in last
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer secret"


REFUSALS = [
    ((400, {"error": {"message": "prompt of 300\ntokens exceeds 256", "code": "x"}}), "prompt of 300 tokens exceeds 256"),
    ((429, {"error": {"message": "queue is full"}}), "answered 429: queue is full"),
    ((401, {"error": {"message": "no key"}}), "no key; set --api-key or UNMASK_API_KEY"),
    ((422, {"detail": "odd body"}), "answered 422: odd body"),
    ((500, b"<html>oh\x1b[2J</html>"), "answered 500: <html>oh\ufffd[2J</html>"),
    ((503, b""), "answered 503: Service Unavailable"),
    ((302, b""), "answered 302"),
    ((200, {"choices": []}), "text/event-stream"),
    ([{"error": {"message": "the engine broke"}}], "ended the answer: the engine broke"),
    ([b"data: {\n\n"], "is no stream of chat completions"),
    ([b"data: 3\n\n"], "is no stream of chat completions"),
    ([{"choices": [{}]}], "is no stream of chat completions"),
    ([{"usage": 3}], "is no stream of chat completions"),
    ([None], "is lost ("),
    ([], "without a finish_reason"),
]


@pytest.mark.parametrize(("answer", "fragment"), REFUSALS)
def test_a_failure_of_the_server_is_one_line_and_ends_nothing(run, server: Server, answer: Any, fragment: str) -> None:
    server.answers = [answer]
    result = run("chat", "--url", server.url, input=typed("a", "b"))
    assert (result.exit_code, result.stdout) == (1, "ok\n"), result.output
    assert fragment in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert server.requests[1][1]["messages"] == [{"role": "user", "content": "b"}], "the unanswered message has made room"


def test_a_connection_lost_in_an_answer_keeps_what_came(run, server: Server) -> None:
    server.answers = [[delta("Once"), delta(" upon"), 0.05, None], [delta("Twice"), OK]]
    result = run("chat", "--url", server.url, input=typed("a", "b", "/retry"))
    assert (result.exit_code, result.stdout) == (1, "Once upon\nTwice\nok\n")
    assert "is lost (" in result.stderr
    bodies = [body["messages"] for _, body in server.requests]
    assert [message["content"] for message in bodies[1]] == ["a", "Once upon", "b"]
    assert bodies[2] == bodies[1]


def test_retry_asks_again_what_was_not_answered(run, server: Server) -> None:
    server.answers = [(503, {"error": {"message": "stopping"}})]
    result = run("chat", "--url", server.url, input=typed("a", "/reset", "/retry"))
    assert result.stdout == "ok\n"
    assert server.requests[1][1]["messages"] == [{"role": "user", "content": "a"}]


def test_an_answer_that_is_cut_says_so(run, server: Server) -> None:
    server.answers = [[delta("a"), {"choices": [{"delta": {}, "finish_reason": "length"}]}]]
    result = run("chat", "--url", server.url, input="a\n")
    assert (result.exit_code, result.stdout) == (0, "a\n")
    assert "/set max_new_tokens" in result.stderr


def test_no_server_there(fails) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert f"{url}/v1 cannot be reached" in fails("chat", "--url", url, input="a\n")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--url", "127.0.0.1:8000"), "--url 127.0.0.1:8000 "),
        (("--url", "http://127.0.0.1:notaport"), "malformed"),
        (("--url", "ftp://127.0.0.1"), "no http scheme"),
        (("--url", "http://127.0.0.1", "--watch"), "not with --url"),
        (("--url", "http://127.0.0.1", "--quantize", "int8"), "not with --url"),
        (("--url", "http://127.0.0.1", "--api-key", "schlüssel"), "an HTTP header cannot carry"),
        (("--url", "http://127.0.0.1", "--api-key", "a\nb"), "an HTTP header cannot carry"),
    ],
)
def test_bad_addresses(fails, options: tuple[str, ...], fragment: str) -> None:
    assert fragment in fails("chat", *options, input="a\n")


class Terminal:
    """The program in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
        command = [sys.executable, "-c", "from unmask.cli.main import main; main()", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(slave)
        self._seen = ""

    def expect(self, text: str, seconds: float = 30.0) -> str:
        """Wait for a text; what came before it."""
        assert self.sees(text, seconds), self._seen
        before, self._seen = self._seen.split(text, 1)
        return before

    def sees(self, text: str, seconds: float) -> bool:
        """Whether a text comes within so many seconds."""
        deadline = time.monotonic() + seconds
        while text not in self._seen and time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.2)[0]:
                self._seen += os.read(self._master, 4096).decode()
        return text in self._seen

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_prompt(self) -> None:
        """Ctrl-C at the prompt, once the program waits for keys: CPython's readline misses one that comes just before."""
        waits_in = Path(f"/proc/{self.process.pid}/wchan")
        deadline = time.monotonic() + 30
        while "poll" not in waits_in.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.type("\x03")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_session(server: Server) -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 4}}
    server.answers = [[delta("\x1b[2JHi"), OK, usage], [delta("Once upon"), 60.0]]
    terminal = Terminal("chat", "--url", server.url)
    try:
        terminal.expect("/help lists the commands")
        terminal.expect("> ")
        terminal.type("Hello\n")
        terminal.expect("\ufffd[2JHi\r\n")
        terminal.expect("4 tokens, ")
        terminal.expect("> ")
        terminal.type("More\\\n")
        terminal.expect(". ")
        terminal.type("of it\n")
        terminal.expect("Once upon")
        terminal.type("\x03")
        terminal.expect("stopped; the text so far is kept")
        terminal.expect("> ")
        terminal.interrupt_prompt()
        terminal.expect("Ctrl-C again, or Ctrl-D, to leave")
        terminal.expect("> ")
        terminal.type("Go on\n")
        terminal.expect("ok\r\n")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
    contents = [message["content"] for message in server.requests[2][1]["messages"]]
    assert contents == ["Hello", "\x1b[2JHi", "More\nof it", "Once upon", "Go on"]
