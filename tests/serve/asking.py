"""The official `openai` client, synchronous or not, streamed or not, with responses in one form; and the engine's completions.

Every stream is checked before it is joined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI

from unmask.engine.llm import LanguageModel
from unmask.engine.request import distinct_samples

WAYS = ("plain", "stream", "async", "async stream")
TWO_WAYS = ("plain", "async stream")
"""Where all four would only be slower."""
HTTP = httpx2.Client(verify=False, timeout=60)
"""For requests that the official client does not make; loading no certificates saves most of their time."""
HELLO = [{"role": "user", "content": "Hello, how are you?"}]
PARAMETERS: dict[str, dict[str, Any]] = {
    "add": {"left": {"type": "integer", "minimum": 0, "maximum": 9}, "sign": {"enum": ["+", "-"]}},
    "ring": {"times": {"enum": [1, 2]}},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    name: {"type": "object", "properties": properties, "required": list(properties)} for name, properties in PARAMETERS.items()
}
"""Parameters of two functions."""


@dataclass
class ReceivedChoice:
    """One choice. `calls` are names and arguments, `logprobs` as they came over the wire."""

    text: str = ""
    finish_reason: str | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    logprobs: list[Mapping[str, Any]] | None = None


@dataclass
class Reply:
    """All choices, and (prompt, completion) tokens."""

    choices: list[ReceivedChoice]
    usage: tuple[int, int]


def ask(url: str, way: str, *, endpoint: str = "chat", **body: Any) -> Reply:
    """Ask a server in one of the `WAYS`."""
    body = {"model": "tiny", "messages" if endpoint == "chat" else "prompt": HELLO if endpoint == "chat" else "Hello", **body}
    if "stream" in way:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if way.startswith("async"):
        return asyncio.run(_ask_once(url, endpoint, body))
    with connect(url) as client:
        api: Any = client.chat.completions if endpoint == "chat" else client.completions
        got = api.create(**body)
        return joined(list(got)) if "stream" in way else whole(got)


def connect(url: str, **options: Any) -> OpenAI:
    """The official client, which tries nothing twice and loads no certificates."""
    options = {"api_key": "none", "max_retries": 0, **options}
    return OpenAI(base_url=f"{url}/v1", http_client=DefaultHttpxClient(verify=False), **options)


def connect_async(url: str) -> AsyncOpenAI:
    """The same, asynchronous."""
    http = DefaultAsyncHttpxClient(verify=False)
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)


async def _ask_once(url: str, endpoint: str, body: dict[str, Any]) -> Reply:
    async with connect_async(url) as client:
        return await ask_async(client, endpoint, body)


async def ask_async(client: AsyncOpenAI, endpoint: str, body: Mapping[str, Any]) -> Reply:
    """Ask with an asynchronous client."""
    api: Any = client.chat.completions if endpoint == "chat" else client.completions
    got = await api.create(**body)
    return joined([chunk async for chunk in got]) if body.get("stream") else whole(got)


def whole(response: Any) -> Reply:
    """A response that was not streamed."""
    choices = []
    assert [choice.index for choice in response.choices] == list(range(len(response.choices)))
    for choice in response.choices:
        logprobs = None if choice.logprobs is None else choice.logprobs.to_dict()
        if response.object == "text_completion":
            choices.append(ReceivedChoice(choice.text, choice.finish_reason, logprobs=None if logprobs is None else [logprobs]))
            continue
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        assert choice.message.role == "assistant"
        assert choice.message.content != "" if calls else choice.message.content is not None
        content_logprobs = None if logprobs is None else logprobs["content"]
        choices.append(ReceivedChoice(choice.message.content or "", choice.finish_reason, calls, content_logprobs))
    usage = response.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return Reply(choices, (usage.prompt_tokens, usage.completion_tokens))


def joined(chunks: Sequence[Any]) -> Reply:
    """A stream with usage, as one."""
    *chunks, last = chunks
    assert last.choices == []
    assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks} == {
        (last.id, last.created, last.model, last.object)
    }
    received: dict[int, ReceivedChoice] = {}
    for chunk in chunks:
        assert chunk.to_dict()["usage"] is None
        for choice in chunk.choices:
            begins = choice.index not in received
            _take(received.setdefault(choice.index, ReceivedChoice()), choice, begins=begins)
    assert all(choice.finish_reason is not None for choice in received.values())
    return Reply([received[i] for i in range(len(received))], (last.usage.prompt_tokens, last.usage.completion_tokens))


def _take(received: ReceivedChoice, choice: Any, *, begins: bool) -> None:
    assert received.finish_reason is None, "nothing follows a finish reason"
    received.finish_reason = choice.finish_reason
    logprobs = None if choice.logprobs is None else choice.logprobs.to_dict()
    if not hasattr(choice, "delta"):
        received.text += choice.text
        if logprobs is not None:
            received.logprobs = [_extended(received.logprobs[0], logprobs) if received.logprobs else logprobs]
        return
    delta = choice.delta
    assert (delta.role == "assistant") == begins
    received.text += delta.content or ""
    if logprobs is not None:
        received.logprobs = [*(received.logprobs or []), *logprobs["content"]]
    for call in delta.tool_calls or []:
        if call.index == len(received.calls):
            assert call.id is not None
            assert call.type == "function"
            received.calls.append((call.function.name, ""))
        name, arguments = received.calls[call.index]
        received.calls[call.index] = (name, arguments + (call.function.arguments or ""))


def _extended(before: Mapping[str, Any], more: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: [*before[name], *more[name]] for name in before}


def expected(model: LanguageModel, ids: Sequence[int], *, n: int = 1, max_new_tokens: int, **options: Any) -> Reply:
    """What the engine itself makes of these ids, each completion alone and with an empty cache."""
    assert model.tokenizer is not None
    request = model.request(ids, max_new_tokens=max_new_tokens, **options)
    done = [model.engine(prefix_cache=False).run([sample])[0] for sample in distinct_samples([request] * n)]
    choices = [
        ReceivedChoice(model.tokenizer.decode(each.ids) if each.text is None else each.text, each.finish_reason)
        for each in done
    ]
    return Reply(choices, (len(ids), sum(len(each.ids) for each in done)))


def chat_ids(model: LanguageModel, messages: Sequence[Mapping[str, Any]] = HELLO) -> list[int]:
    """Ids of a conversation, as the template writes it."""
    assert model.tokenizer is not None
    return model.tokenizer.chat(messages, add_generation_prompt=True)


def texts(reply: Reply) -> list[tuple[str, str | None]]:
    """Text and finish reason of every choice."""
    return [(received.text, received.finish_reason) for received in reply.choices]
