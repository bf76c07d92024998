"""/v1/messages through Anthropic's official client: it says what chat completions say, in that API's words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from asking import HELLO, HTTP, SCHEMAS, TWO_WAYS, ask
from live import NAME, Live, live, served_model

from unmask.serve.api.anthropic_writer import partial_arguments
from unmask.serve.config import ServerConfig
from unmask.serve.protocol.anthropic import MessagesRequest

anthropic = pytest.importorskip("anthropic")
TOOLS: list[dict[str, Any]] = [
    {"name": name, "input_schema": schema, "cache_control": {"type": "ephemeral"}} for name, schema in SCHEMAS.items()
]
CHAT_TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
SAMPLED: dict[str, Any] = {"max_tokens": 1000, "extra_body": {"temperature": 1.5, "seed": 6}}


def connect(url: str, **options: Any) -> Any:
    return anthropic.Anthropic(
        base_url=url, **{"api_key": "none", "max_retries": 0, "http_client": httpx2.Client(verify=False), **options}
    )


@pytest.fixture(scope="module")
def client(site: Live) -> Iterator[Any]:
    with connect(site.url) as made:
        yield made


@pytest.fixture(scope="module")
def desk(office: Live) -> Iterator[Any]:
    with connect(office.url) as made:
        yield made


def write(client: Any, way: str, **body: Any) -> Any:
    """A message, whole or joined from its stream; what came is what the client's types want."""
    body = {"model": NAME, "messages": HELLO, **body}
    if "stream" not in way:
        message = client.messages.create(**body)
        anthropic.types.Message.model_validate(message.to_dict(), strict=True)
        return message
    with client.messages.stream(**body) as stream:
        events = [event for event in stream if event.type in RAW]
        message = stream.get_final_message()
    kinds = [event.type for event in events]
    middle = [kind for index, _ in enumerate(message.content) for kind in _block_kinds(events, index)]
    assert kinds == ["message_start", *middle, "message_delta", "message_stop"]
    return message


RAW = {
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
}  # fmt: skip


def _block_kinds(events: list[Any], index: int) -> list[str]:
    deltas = [event for event in events if event.type == "content_block_delta" and event.index == index]
    return ["content_block_start", *(event.type for event in deltas), "content_block_stop"]


@pytest.mark.parametrize("way", TWO_WAYS)
def test_a_message_says_what_a_chat_completion_says(site: Live, client: Any, way: str) -> None:
    target = ask(site.url, "plain", max_tokens=8)
    message = write(client, way, max_tokens=8)
    assert [block.text for block in message.content] == [target.choices[0].text]
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == ("assistant", NAME, "max_tokens", None)
    usage = message.usage
    assert (usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens) == target.usage
    counted = client.messages.count_tokens(model=NAME, messages=HELLO)
    assert counted.input_tokens == target.usage[0]


@pytest.mark.parametrize("way", TWO_WAYS)
def test_the_stop_sequence_is_named(client: Any, way: str) -> None:
    text = write(client, "plain", max_tokens=8).content[0].text
    stop = next(text[i : i + 2] for i in range(1, len(text)) if text.index(text[i : i + 2]) == i)
    message = write(client, way, max_tokens=8, stop_sequences=["never", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]


@pytest.mark.parametrize("way", TWO_WAYS)
def test_calls_are_content_blocks(office: Live, desk: Any, way: str) -> None:
    chat = {"temperature": 1.5, "seed": 6, "max_tokens": 1000}
    target = ask(office.url, "plain", tools=CHAT_TOOLS, tool_choice="required", **chat).choices[0]
    message = write(desk, way, tools=TOOLS, tool_choice={"type": "any"}, **SAMPLED)
    assert [(block.name, block.input) for block in message.content] == [
        (name, json.loads(arguments)) for name, arguments in target.calls
    ]
    assert message.stop_reason == "tool_use"
    named = write(desk, way, tools=TOOLS, tool_choice={"type": "tool", "name": "ring"}, **SAMPLED)
    assert ([block.name for block in named.content], named.stop_reason) == (["ring"], "tool_use")
    single = write(desk, way, tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **SAMPLED)
    assert len(single.content) == 1
    none = write(desk, way, tools=TOOLS, tool_choice={"type": "none"}, max_tokens=4)
    assert [block.type for block in none.content] == ["text"]


def test_results_go_back(office: Live, desk: Any) -> None:
    first = write(desk, "plain", tools=TOOLS, tool_choice={"type": "any"}, **SAMPLED)
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "7"} for block in first.content]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in first.content
    ]
    turns = [
        {"role": "system", "content": "Be kind.\nBe brief."},
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": call["id"], "content": "7"} for call in calls),
        {"role": "user", "content": "Well?"},
    ]
    target = ask(office.url, "plain", messages=turns, tools=CHAT_TOOLS, max_tokens=4)
    system = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in ("Be kind.", "Be brief.")]
    messages = [*HELLO, first.to_param(), {"role": "user", "content": [*results, {"type": "text", "text": "Well?"}]}]
    message = write(desk, "plain", system=system, messages=messages, tools=TOOLS, max_tokens=4)
    assert message.content[0].text == target.choices[0].text
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == target.usage[0]


def test_an_answer_that_the_client_has_begun_is_continued(site: Live, client: Any) -> None:
    turns = [*HELLO, {"role": "assistant", "content": "I am"}]
    target = ask(site.url, "plain", messages=turns, max_tokens=4, extra_body={"continue_final_message": True})
    message = write(client, "plain", messages=turns, max_tokens=4)
    assert message.content[0].text == target.choices[0].text
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == target.usage[0]
    called = [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages: the last message"):
        write(client, "plain", messages=[*HELLO, {"role": "assistant", "content": called}], max_tokens=4)


def test_max_tokens_may_exceed_what_the_context_leaves(site: Live, client: Any) -> None:
    long = [{"role": "user", "content": "x" * 225}]
    message = write(client, "plain", messages=long, max_tokens=4096, extra_body={"ignore_eos": True})
    assert message.stop_reason == "model_context_window_exceeded"
    tokens = message.usage.input_tokens + message.usage.cache_read_input_tokens + message.usage.output_tokens
    assert tokens == site.app.state.unmask.model.context
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        write(client, "plain", messages=[{"role": "user", "content": "Hello " * 400}], max_tokens=4)


def test_messages_are_translated() -> None:
    body = MessagesRequest.model_validate(
        {
            "model": NAME,
            "max_tokens": 5,
            "messages": [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm", "signature": "x"},
                        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "a",
                            "is_error": True,
                            "content": [{"type": "text", "text": "no"}],
                        }
                    ],
                },
            ],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "tools": TOOLS,
            "metadata": {"user_id": None},
            "thinking": {"type": "disabled"},
            "output_config": {"format": {"type": "json_schema", "schema": {"type": "integer"}}},
            "top_k": 3,
        }
    )
    chat = body.chat()
    assert [(each.role, each.content, each.tool_call_id) for each in chat.messages] == [
        ("user", "Hi", None),
        ("assistant", "", None),
        ("tool", "Error: no", "a"),
    ]
    assert (chat.max_completion_tokens, chat.tool_choice, chat.parallel_tool_calls, chat.top_k) == (5, "auto", False, 3)
    assert chat.response_format is not None


@pytest.mark.parametrize("arguments", ['{"a": 1', '{"a": "\\', '{"a": "\\ud83d', "{", "", '{"a": [{"b": "c'])
def test_arguments_that_break_off_are_an_object(arguments: str) -> None:
    assert isinstance(partial_arguments(arguments), dict)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            r"messages\[0\].content\[0\].type.*image",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "content of the user message"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "no"}}}}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "name"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_wrong_is_named(client: Any, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=name) as caught:
        client.messages.create(**{"model": NAME, "max_tokens": 4, "messages": HELLO, **fields})
    body = caught.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_models_in_the_words_of_the_client_that_asks(site: Live, client: Any) -> None:
    (model,) = client.models.list()
    assert (model.id, client.models.retrieve(NAME).id) == (NAME, NAME)
    assert HTTP.get(f"{site.url}/v1/models").json()["data"][0]["object"] == "model"
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="other", max_tokens=4, messages=HELLO)
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_keys_and_streams_that_fail(tmp_path: Any) -> None:
    model = served_model(tmp_path, seconds=0.05)
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 100, "messages": HELLO}
    with live(model, ServerConfig(api_keys=("a-key",), timeout=0.4)) as site:
        with connect(site.url) as client, pytest.raises(anthropic.AuthenticationError) as refused:
            client.messages.create(**asked)
        assert refused.value.body["error"]["type"] == "authentication_error"
        with connect(site.url, api_key="a-key") as client, pytest.raises(anthropic.APIStatusError) as caught:
            list(client.messages.create(**asked, stream=True))
        assert caught.value.body["error"]["type"] == "timeout_error"
