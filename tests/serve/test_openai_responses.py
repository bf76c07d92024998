"""/v1/responses through the official client: its types accept all objects and events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from asking import HELLO, HTTP, SCHEMAS, TWO_WAYS, ask, connect
from live import NAME, Live, live, served_model
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from unmask.serve.api.responses_store import ResponseStore
from unmask.serve.config import ServerConfig
from unmask.serve.protocol.responses import ResponsesRequest

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": name, "parameters": schema, "strict": True} for name, schema in SCHEMAS.items()
]
CHAT_TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
SAMPLED: dict[str, Any] = {"temperature": 1.5, "extra_body": {"seed": 6}, "max_output_tokens": 1000}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def desk(office: Live) -> Iterator[OpenAI]:
    with connect(office.url) as made:
        yield made


def respond(client: OpenAI, way: str, **body: Any) -> Response:
    """Whole or joined from a stream; whatever came is what OpenAI's types want."""
    body = {"model": NAME, "input": "Hello, how are you?", **body}
    if "stream" not in way:
        response = client.responses.create(**body)
        Response.model_validate(response.to_dict(), strict=True)
        return response
    events = list(client.responses.create(**body, stream=True))
    for number, event in enumerate(events):
        EVENT.validate_python(event.to_dict(), strict=True)
        assert event.sequence_number == number
    return _joined(events)


def _joined(events: Sequence[Any]) -> Response:
    """The response of a stream whose events agree with each other."""
    first, second, *middle, last = events
    assert (first.type, second.type) == ("response.created", "response.in_progress")
    assert first.response.output == []
    response: Response = last.response
    assert last.type == f"response.{response.status}"
    assert response.id == first.response.id
    expected = iter(middle)
    for index, item in enumerate(response.output):
        added = next(expected)
        assert (added.type, added.output_index, added.item.id) == ("response.output_item.added", index, item.id)
        of_part = list(_until_done(expected))
        assert {event.item_id for event in of_part} == {item.id}
        if item.type == "message":
            start, *deltas, done, end = of_part
            assert (start.type, start.part.text) == ("response.content_part.added", "")
            assert {event.type for event in deltas} <= {"response.output_text.delta"}
            (content,) = item.content
            assert "".join(event.delta for event in deltas) == done.text == end.part.text == content.text
            assert [entry for event in deltas for entry in event.to_dict()["logprobs"]] == content.to_dict()["logprobs"]
        else:
            *deltas, done = of_part
            assert {event.type for event in deltas} == {"response.function_call_arguments.delta"}
            assert "".join(event.delta for event in deltas) == done.arguments == item.arguments
    assert not list(expected)
    return response


def _until_done(events: Iterator[Any]) -> Iterator[Any]:
    for event in events:
        if event.type == "response.output_item.done":
            return
        yield event


@pytest.mark.parametrize("way", TWO_WAYS)
def test_a_response_says_what_a_chat_completion_says(site: Live, client: OpenAI, way: str) -> None:
    target = ask(site.url, "plain", max_tokens=8)
    response = respond(client, way, max_output_tokens=8)
    assert response.output_text == target.choices[0].text
    assert (response.status, response.output[0].status) == ("incomplete", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.usage.input_tokens, response.usage.output_tokens) == target.usage
    assert response.usage.total_tokens == sum(target.usage)
    assert client.responses.input_tokens.count(model=NAME, input="Hello, how are you?").input_tokens == target.usage[0]


@pytest.mark.parametrize("way", TWO_WAYS)
def test_log_probabilities_are_included_when_asked_for(site: Live, client: OpenAI, way: str) -> None:
    target = ask(site.url, "plain", max_tokens=8, logprobs=True, top_logprobs=2).choices[0].logprobs
    response = respond(client, way, max_output_tokens=8, top_logprobs=2, include=["message.output_text.logprobs"])
    assert response.output[0].content[0].to_dict()["logprobs"] == target
    assert respond(client, way, max_output_tokens=8).output[0].content[0].logprobs == []


@pytest.mark.parametrize("way", TWO_WAYS)
def test_calls_are_output_items(office: Live, desk: OpenAI, way: str) -> None:
    chat = {"temperature": 1.5, "seed": 6, "max_tokens": 1000}
    target = ask(office.url, "plain", tools=CHAT_TOOLS, tool_choice="required", **chat).choices[0]
    response = respond(desk, way, tools=TOOLS, tool_choice="required", **SAMPLED)
    assert [(item.name, item.arguments) for item in response.output] == target.calls
    assert len({item.call_id for item in response.output}) == len(target.calls) > 0
    assert {item.status for item in response.output} == {response.status} == {"completed"}
    named = respond(desk, way, tools=TOOLS, tool_choice={"type": "function", "name": "ring"}, **SAMPLED)
    assert [item.name for item in named.output] == ["ring"]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]}
    assert {item.name for item in respond(desk, way, tools=TOOLS, tool_choice=allowed, **SAMPLED).output} == {"add"}
    none = respond(desk, way, tools=TOOLS, tool_choice="none", max_output_tokens=4)
    assert [item.type for item in none.output] == ["message"]


def test_a_conversation_goes_on_by_items_by_id_and_by_reference(office: Live, desk: OpenAI) -> None:
    first = respond(desk, "plain", tools=TOOLS, tool_choice="required", **SAMPLED)
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "7"} for call in first.output]
    calls = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in first.output
    ]
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": call["id"], "content": "7"} for call in calls),
    ]
    target = ask(office.url, "plain", messages=turns, tools=CHAT_TOOLS, max_tokens=4)
    more: dict[str, Any] = {"tools": TOOLS, "max_output_tokens": 4}
    items = [*HELLO, *(item.to_dict() for item in first.output), *results]
    references = [*HELLO, *({"type": "item_reference", "id": item.id} for item in first.output), *results]
    by_id = respond(desk, "plain", input=results, previous_response_id=first.id, **more)
    for response in (by_id, respond(desk, "plain", input=items, **more), respond(desk, "plain", input=references, **more)):
        assert response.output_text == target.choices[0].text
        assert (response.usage.input_tokens, response.usage.output_tokens) == target.usage
    again = desk.responses.input_tokens.count(model=NAME, input="Hello", previous_response_id=by_id.id, tools=TOOLS)
    assert again.input_tokens > sum(target.usage)


def test_responses_are_stored_unless_asked_otherwise(client: OpenAI) -> None:
    kept = respond(client, "stream", max_output_tokens=2)
    assert client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
    client.responses.delete(kept.id)
    for gone in (kept, respond(client, "plain", max_output_tokens=2, store=False)):
        with pytest.raises(NotFoundError):
            client.responses.retrieve(gone.id)
        with pytest.raises(BadRequestError, match="whole conversation") as caught:
            respond(client, "plain", previous_response_id=gone.id)
        assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")


def test_the_store_forgets_the_least_recently_used() -> None:
    def response(name: str) -> dict[str, Any]:
        return {"id": name, "output": [{"id": f"item of {name}", "text": "x" * 100}]}

    store = ResponseStore(max_bytes=360)
    for name in ("a", "b", "c"):
        store.put("me", response(name), [])
        assert store.conversation("me", "a") == response("a")["output"]
    store.put("me", response("large") | {"input": "x" * 500}, [])
    assert [name for name in ("a", "b", "c", "large") if store.get("me", name)] == ["a", "c"]
    assert store.item("me", "item of c") == response("c")["output"][0]
    assert store.item("me", "item of b") is None
    assert store.delete("me", "c")
    assert not store.delete("me", "c")
    assert store.item("me", "item of c") is None


class Sum(BaseModel):
    left: int = Field(ge=0, le=9)


def test_text_of_a_format(office: Live, desk: OpenAI) -> None:
    parsed = desk.responses.parse(model=NAME, input="Hello", text_format=Sum, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Sum)
    asked = {"format": {"type": "json_object"}, "verbosity": "low"}
    assert respond(desk, "plain", text=asked, max_output_tokens=4).output_text.startswith("{")


def test_a_conversation_is_truncated_where_that_is_asked(client: OpenAI) -> None:
    items = [{"role": ("user", "assistant")[index % 2], "content": f"{index}: {'Hello ' * 8}"} for index in range(31)]
    asked: dict[str, Any] = {"input": items, "instructions": "Be kind.", "max_output_tokens": 8}
    with pytest.raises(BadRequestError) as caught:
        respond(client, "plain", **asked)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
    response = respond(client, "plain", truncation="auto", **asked)
    assert 100 < response.usage.input_tokens <= 248
    with pytest.raises(BadRequestError):
        respond(client, "plain", input="Hello " * 400, truncation="auto")


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    body = ResponsesRequest.model_validate(
        {
            "model": NAME,
            "instructions": "Be kind.",
            "input": [
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "I call.", "annotations": []}],
                },
                call,
                {**call, "call_id": "b"},
                {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
                call,
            ],
            "reasoning": {"effort": "low"},
            "top_logprobs": 3,
            "temperature": 0.5,
            "diffusion": {"threshold": 0.8},
        }
    )
    chat = body.chat(body.items)
    roles = [
        (each.role, [call.id for call in each.tool_calls] if each.tool_calls else each.tool_call_id) for each in chat.messages
    ]
    assert roles == [
        ("system", None),
        ("developer", None),
        ("user", None),
        ("assistant", ["a", "b"]),
        ("tool", "a"),
        ("assistant", ["a"]),
    ]
    assert (chat.logprobs, chat.top_logprobs, chat.temperature, chat.diffusion.threshold) == (True, 3, 0.5, 0.8)


def _function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "name": "f", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param", "name"),
    [
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0].type", "web_search_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_image"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0]", "arguments"),
        ({"input": [{"id": "msg_1"}]}, "input[0].id", "msg_1"),
        ({"input": [{"type": "reasoning"}]}, "input", "message"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        (
            _function(parameters={"type": "object", "properties": {"a": {"type": "no"}}}),
            "tools[0].parameters",
            "tools\\[0\\].par",
        ),
        (_function(name="a b"), "tools[0].name", "tools\\[0\\].name"),
        ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no"}}}}, "text.format.schema", "no"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "schema"),
        ({"max_output_tokens": 999}, "input", "context"),
        ({"extra_body": {"conversation": "conv_1"}}, "conversation", "not stored"),
        ({"extra_body": {"background": True}}, "background", "waits"),
        ({"stream": True, "extra_body": {"diffusion": {"watch": True}}}, "diffusion.watch", "chat"),
    ],
)
def test_what_is_wrong_is_named(client: OpenAI, fields: dict[str, Any], param: str, name: str) -> None:
    with pytest.raises(BadRequestError, match=name) as caught:
        client.responses.create(**{"model": NAME, "input": "Hello", **fields})
    assert caught.value.param == param


def test_what_cannot_be_sent_back_is_refused(site: Live) -> None:
    body = json.dumps({"model": NAME, "input": "Hello", "max_output_tokens": 1, "metadata": {"a": "\ud800"}})
    response = HTTP.post(f"{site.url}/v1/responses", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "metadata")


def test_a_stream_that_fails_ends_with_the_failure(tmp_path: Any) -> None:
    model = served_model(tmp_path, seconds=0.05)
    with live(model, ServerConfig(timeout=0.4)) as site, connect(site.url) as client:
        *_, last = client.responses.create(model=NAME, input="Hello", max_output_tokens=100, stream=True)
    EVENT.validate_python(last.to_dict(), strict=True)
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert "timeout" in last.response.error.message
