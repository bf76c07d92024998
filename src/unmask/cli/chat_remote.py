"""`RemoteResponder`: `unmask chat` with an OpenAI-compatible server.

Owns the HTTP requests and the messages about their failures. Knows no command, no prompt line and no model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx2

from unmask.cli.chat_session import ChatReply, EndReason, Write
from unmask.data.chat import Message
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError, RequestError

_TIMEOUT = httpx2.Timeout(10.0, read=600.0)
_MAX_MESSAGE = 400


class RemoteResponder:
    """Gets replies from a server: ours, or any that streams OpenAI chat completions.

    Args:
        url: of the server; /v1 is added where it has no path.
        key: sent as a bearer token.
        model: name of one of the server's models; None: its first.
        interruptible: Ctrl-C ends the reply, not the program.

    Raises:
        ConfigError: a malformed URL or key.
        RequestError: the server cannot be reached.
    """

    def __init__(self, url: str, *, key: str | None, model: str | None, interruptible: bool) -> None:
        try:
            parts = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"--url {url} is malformed ({error}); use one like http://127.0.0.1:8000") from error
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ConfigError(f"--url {url} has no http scheme or no host; use one like http://127.0.0.1:8000")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key holds a character that an HTTP header cannot carry; copy it again")
        self._root = url.rstrip("/") + ("/v1" if parts.path == "/" else "")
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        # Reading the certificates takes 0.1 s: only once, and only for https.
        self._tls = httpx2.create_ssl_context() if parts.scheme == "https" else False
        self._interruptible = interruptible
        self._model = model if model is not None else self._first_model()
        self.about = f"{self._model} at {url}"

    def check(self, params: SamplingParams) -> None:
        """The server checks the options."""

    def reply(self, messages: Sequence[Message], params: SamplingParams, attempt: int, write: Write) -> ChatReply:
        body: dict[str, Any] = {"model": self._model, "messages": list(messages), "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        given, declared = params.given(), SamplingParams.options()
        if "max_new_tokens" in given:
            body["max_tokens"] = given.pop("max_new_tokens")
        if attempt:
            given["seed"] = (params.seed or 0) + attempt
        # Options that only this project's server knows go into a section of their own: others refuse unknown fields.
        ours = {name: given.pop(name) for name in list(given) if "diffusion" in declared[name].surfaces}
        body |= given
        if ours:
            body["diffusion"] = ours
        return self._read(body, write)

    def _read(self, body: Mapping[str, Any], write: Write) -> ChatReply:
        started, text, failure = time.perf_counter(), "", None
        end: EndReason = "lost"
        usage: dict[str, Any] = {}
        cost: dict[str, Any] = {}
        try:
            for chunk in self._chunks(body):
                usage, cost = {**usage, **(chunk.get("usage") or {})}, {**cost, **(chunk.get("diffusion") or {})}
                for choice in chunk.get("choices") or ():
                    content = choice["delta"].get("content") or ""
                    if choice.get("finish_reason") is not None:
                        end = "length" if choice["finish_reason"] == "length" else "stop"
                    text += content
                    if content:
                        write(content)
            if end == "lost":
                failure = "the server ended the answer without a finish_reason; /retry sends the message again"
        except KeyboardInterrupt:
            if not self._interruptible:
                raise
            end = "interrupted"
        except RequestError as error:
            end, failure = "lost", str(error)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            end, failure = "lost", f"the response of {self._root} is no stream of chat completions ({error!r}); correct --url"
        if failure is not None and not text:
            raise RequestError(failure)
        return ChatReply(
            text=text,
            end=end,
            seconds=time.perf_counter() - started,
            tokens=_count(usage, "completion_tokens"),
            forwards=_count(cost, "forwards"),
            cached_tokens=_count(cost, "cached_tokens"),
            prompt_tokens=_count(usage, "prompt_tokens"),
            error=failure,
        )

    def _chunks(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with self._request("POST", "/chat/completions", body) as response:
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                chunk: Any = event.json()
                if "error" in chunk:
                    raise RequestError(f"the server ended the answer: {_message(chunk)}; /retry sends the message again")
                yield chunk

    def _first_model(self) -> str:
        with self._request("GET", "/models") as response:
            response.read()
            try:
                return str(response.json()["data"][0]["id"])
            except (LookupError, TypeError, ValueError) as error:
                raise RequestError(f"{self._root} does not list its models; name one with --model") from error

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[httpx2.Response]:
        """A request on a new connection, because Ctrl-C may leave one in the middle of a response."""
        try:
            with (
                httpx2.Client(headers=self._headers, timeout=_TIMEOUT, verify=self._tls) as client,
                client.stream(method, self._root + path, json=body) as response,
            ):
                if response.status_code != httpx2.codes.OK:
                    response.read()
                    remedy = "; set --api-key or UNMASK_API_KEY" if response.status_code == 401 else ""
                    raise RequestError(f"the server answered {response.status_code}: {_error_of(response)}{remedy}")
                yield response
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise RequestError(f"{self._root} cannot be reached ({error}); start it (unmask serve) or correct --url") from error
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise RequestError(f"the connection to {self._root} is lost ({reason}); /retry sends the message again") from error


def _count(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) else None


def _error_of(response: httpx2.Response) -> str:
    try:
        return _message(response.json())
    except ValueError:
        return _message(response.text) or response.reason_phrase


def _message(body: Any) -> str:
    """The message of an error body, in any of the forms that servers use."""
    while isinstance(body, dict):
        body = next((body[name] for name in ("error", "message", "detail") if name in body), str(body))
    return " ".join(str(body).split())[:_MAX_MESSAGE]
