"""Tools through the official client: calls that are always valid, streamed or not, and what goes back to the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from asking import HELLO, TWO_WAYS, WAYS, ReceivedChoice, ask, connect
from live import Live, live, served_model
from openai import BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from helpers import CHATML
from unmask.engine.llm import LanguageModel
from unmask.serve.protocol.messages import FunctionSpec
from unmask.serve.tool_parser import CallArguments, CallParser, CallStart, Content
from unmask.serve.tools import ToolChoice, tool_format

# It asks for calls in a way that is not known here.
OTHERWISE = "{% if tools %}{{ '[TOOLS]' + (tools | tojson) }}{% endif %}" + CHATML


class Add(BaseModel):
    """Add two digits."""

    left: int = Field(ge=0, le=9)
    sign: Literal["+", "-"]


class Ring(BaseModel):
    """Ring once or twice."""

    times: Literal[1, 2]


TOOLS = [pydantic_function_tool(Add, name="add"), pydantic_function_tool(Ring, name="ring")]
MODELS: dict[str, type[BaseModel]] = {"add": Add, "ring": Ring}
FUNCTIONS = [FunctionSpec(**tool["function"]) for tool in TOOLS]
SAMPLED = {"temperature": 1.5, "seed": 2, "max_tokens": 1000}


@pytest.fixture(scope="module")
def desk(office: Live) -> Iterator[OpenAI]:
    with connect(office.url) as client:
        yield client


def _calling(caller: LanguageModel) -> dict[str, float]:
    """A bias to calls, and to more of them, where a choice is left."""
    (marker,), (newline,) = caller.tokenizer.encode("<tool_call>"), caller.tokenizer.encode("\n")
    return {str(marker): 60.0, str(newline): 50.0}


def _engines(caller: LanguageModel, choice: ToolChoice, *, parallel: bool = True, **options: Any) -> ReceivedChoice:
    """What the engine says, cut by the parser as a whole."""
    tokenizer = caller.tokenizer
    form = tool_format(tokenizer)
    turns, shown = form.messages(HELLO, FUNCTIONS, choice)
    ids = tokenizer.chat(turns, add_generation_prompt=True, tools=shown)
    grammar = form.compile(caller.grammars, FUNCTIONS, choice, parallel=parallel)
    done = caller.complete(ids, max_new_tokens=options.pop("max_tokens"), grammar=grammar, **options)
    received = ReceivedChoice(finish_reason=done.finish_reason)
    parser = CallParser(MODELS)
    for event in [*parser.push(tokenizer.decode(done.ids)), *parser.finish()]:
        match event:
            case Content(text=text):
                received.text += text
            case CallStart(name=name):
                received.calls.append((name, ""))
            case CallArguments(text=text):
                received.calls[-1] = (received.calls[-1][0], received.calls[-1][1] + text)
    return received


def _check(received: ReceivedChoice) -> None:
    for name, arguments in received.calls:
        MODELS[name].model_validate_json(arguments)


@pytest.mark.parametrize("way", WAYS)
def test_required_calls_are_valid_and_parallel(office: Live, caller: LanguageModel, way: str) -> None:
    bias = _calling(caller)
    (received,) = ask(office.url, way, tools=TOOLS, tool_choice="required", logit_bias=bias, **SAMPLED).choices
    target = _engines(caller, ToolChoice("required"), logit_bias={int(key): value for key, value in bias.items()}, **SAMPLED)
    assert (received.text, received.calls) == (target.text, target.calls) == ("", target.calls)
    assert len(received.calls) > 1
    assert {name for name, _ in received.calls} == {"add", "ring"}
    assert received.finish_reason == "tool_calls"
    _check(received)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_one_call_where_calls_are_not_parallel(office: Live, caller: LanguageModel, way: str) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "logit_bias": _calling(caller)}
    (received,) = ask(office.url, way, **fields, **SAMPLED).choices
    assert len(received.calls) == 1
    assert received.finish_reason == "tool_calls"
    _check(received)


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize("name", ["add", "ring"])
def test_a_named_function_is_called_once(office: Live, caller: LanguageModel, name: str, way: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    (received,) = ask(office.url, way, tools=TOOLS, tool_choice=choice, logit_bias=_calling(caller), **SAMPLED).choices
    assert [called for called, _ in received.calls] == [name]
    assert received.finish_reason == "stop", "as OpenAI has it for a call that was forced"
    _check(received)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_the_model_may_choose_text(office: Live, caller: LanguageModel, way: str) -> None:
    fields = {"temperature": 1.0, "seed": 4, "max_tokens": 20}
    (received,) = ask(office.url, way, tools=TOOLS, tool_choice="auto", **fields).choices
    target = _engines(caller, ToolChoice("auto"), **fields)
    assert (received.text, received.calls, received.finish_reason) == (target.text, [], "length")
    assert received.text


@pytest.mark.parametrize("way", TWO_WAYS)
def test_the_model_may_choose_to_call(office: Live, caller: LanguageModel, way: str) -> None:
    (received,) = ask(office.url, way, tools=TOOLS, logit_bias=_calling(caller), **SAMPLED).choices
    assert received.calls
    assert received.finish_reason == "tool_calls"
    _check(received)


@pytest.mark.parametrize("way", ["plain", "stream"])
def test_none_is_as_if_there_were_no_tools(office: Live, way: str) -> None:
    fields = {"temperature": 1.0, "seed": 4, "max_tokens": 20}
    assert ask(office.url, way, tools=TOOLS, tool_choice="none", **fields) == ask(office.url, way, **fields)


@pytest.mark.parametrize("way", ["plain", "stream"])
def test_a_call_that_is_cut_off_is_told(office: Live, way: str) -> None:
    (received,) = ask(office.url, way, tools=TOOLS, tool_choice="required", **{**SAMPLED, "max_tokens": 45}).choices
    assert received.finish_reason == "length"
    (name, arguments), *_ = received.calls
    assert name in MODELS
    assert arguments.startswith("{")


def test_several_choices_call_for_themselves(office: Live) -> None:
    plain = ask(office.url, "plain", tools=TOOLS, tool_choice="required", n=3, parallel_tool_calls=False, **SAMPLED)
    assert ask(office.url, "stream", tools=TOOLS, tool_choice="required", n=3, parallel_tool_calls=False, **SAMPLED) == plain
    assert len({str(received.calls) for received in plain.choices}) > 1


def test_arguments_are_streamed(desk: OpenAI, caller: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "seconds", 0.02)  # steps that come faster than they are read are sent as one
    chunks = list(
        desk.chat.completions.create(
            model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, stream=True, **SAMPLED
        )
    )
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert calls[0].id.startswith("call_")
    assert calls[0].function.arguments == ""
    assert all(call.id is None and call.function.name is None for call in calls[1:])
    assert len(calls) > 2, "not all of the arguments at once"
    json.loads("".join(call.function.arguments for call in calls))


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_logprobs_are_the_same_streamed_or_not(office: Live, caller: LanguageModel, choice: str) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "logprobs": True, "parallel_tool_calls": False, **SAMPLED}
    plain, stream = (ask(office.url, way, logit_bias=_calling(caller), **fields) for way in ("plain", "stream"))
    assert plain == stream
    assert plain.choices[0].logprobs
    assert len(plain.choices[0].logprobs) in (plain.usage[1], plain.usage[1] - 1)


def test_the_clients_own_helpers(desk: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": "required", **SAMPLED}
    parsed = desk.chat.completions.parse(**fields).choices[0].message.tool_calls
    with desk.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion().choices[0].message.tool_calls
    assert parsed
    assert final
    assert [call.function.parsed_arguments for call in parsed] == [call.function.parsed_arguments for call in final]
    assert all(isinstance(call.function.parsed_arguments, MODELS[call.function.name]) for call in parsed)
    assert len({call.id for call in parsed}) == len(parsed)


def test_calls_and_results_go_back(desk: OpenAI, caller: LanguageModel) -> None:
    """The message as the client has it, pydantic object and all, and the results behind it."""
    asked: dict[str, Any] = {"model": "tiny", "tools": TOOLS}
    message = desk.chat.completions.parse(messages=HELLO, tool_choice="required", **asked, **SAMPLED).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in message.tool_calls]
    indexed_calls = [{**call, "index": i} for i, call in enumerate(message.to_dict()["tool_calls"])]
    histories = (
        [*HELLO, message, *results],
        [*HELLO, {"role": "assistant", "tool_calls": indexed_calls}, *results],
        [*HELLO, {"role": "assistant", "content": "", "tool_calls": indexed_calls}, *results],
    )
    counts = []
    for messages in histories:
        answer = desk.chat.completions.create(messages=messages, max_tokens=4, **asked)
        counts.append((answer.usage.prompt_tokens, answer.choices[0].message.content))
    calls = [
        {"function": {"name": call.function.name, "arguments": json.loads(call.function.arguments)}}
        for call in message.tool_calls
    ]
    turns = [*HELLO, {"role": "assistant", "content": "", "tool_calls": calls}, *results]
    shown = [
        {"type": "function", "function": function.model_dump(include={"name", "description", "parameters"})}
        for function in FUNCTIONS
    ]
    assert {count for count, _ in counts} == {len(caller.tokenizer.chat(turns, add_generation_prompt=True, tools=shown))}
    assert len(set(counts)) == 1


BAD = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "nothing"}}}},
}


@pytest.mark.parametrize(
    ("fields", "param", "name"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice", "add, ring"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name", "twice"),
        (
            {"tools": [BAD]},
            "tools[0].function.parameters",
            "nothing",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ],
)
def test_what_is_wrong_is_named(desk: OpenAI, fields: dict[str, Any], param: str, name: str) -> None:
    with pytest.raises(BadRequestError, match=name) as caught:
        desk.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, **fields)
    assert caught.value.param == param


def test_a_model_with_a_tool_format_of_its_own_can_still_talk(tmp_path: Any) -> None:
    with live(served_model(tmp_path, chat_template=OTHERWISE)) as site, connect(site.url) as client:
        assert ask(site.url, "plain", max_tokens=4).usage[1] == 4
        with pytest.raises(BadRequestError, match="not supported"):
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, tools=TOOLS)


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize("call", [False, True])
def test_a_response_format_beside_tools_leaves_json_or_a_call(
    office: Live, caller: LanguageModel, way: str, call: bool
) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "maximum": 99}}, "required": ["sum"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    (first,) = caller.tokenizer.encode("<tool_call>" if call else "{")
    bias = {str(first): 90.0}
    (received,) = ask(office.url, way, tools=TOOLS, response_format=form, logit_bias=bias, **SAMPLED).choices
    if call:
        assert (received.text, received.finish_reason) == ("", "tool_calls")
        _check(received)
    else:
        assert not received.calls
        assert set(json.loads(received.text)) == {"sum"}
        assert received.finish_reason == "stop"
