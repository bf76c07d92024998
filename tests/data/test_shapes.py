from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from helpers import refused, say
from unmask.data.shapes import Conversation, Fields, PlainText, read_example, read_pair
from unmask.errors import DataError

FIELDS = Fields()
CALL = {"name": "add", "arguments": {"a": 1}}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def shared_gpt(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


def turns_of(record: dict[str, Any]) -> tuple[list[Any], int]:
    example = read_example(record, FIELDS)
    assert isinstance(example, Conversation)
    return example.messages, example.num_given


SHAPES: dict[str, dict[str, Any]] = {
    "text": {"text": "t"},
    "messages": {"messages": say("u", "a")},
    "preference": {"chosen": "c", "rejected": "x"},
    "prompt": {"prompt": "p", "response": "r"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_record_of_two_shapes_is_refused_unless_one_is_chosen(shape: Any, other: str) -> None:
    record = SHAPES[other] | SHAPES[shape]
    alone = read_example({**SHAPES[shape], **({"prompt": "p"} if "prompt" in record and shape == "preference" else {})}, FIELDS)
    assert read_example(record | {"text": record.get("text")}, replace(FIELDS, shape=shape)) == alone
    if shape != other:
        with refused(DataError, next(iter(SHAPES[shape])), next(iter(SHAPES[other])), "shape"):
            read_example(record, FIELDS)


def test_shapes_that_say_the_same_are_one() -> None:
    talk = say("u", "a")
    for double in ({"messages": talk, "conversations": talk}, {"messages": talk, "chosen": talk, "rejected": say("u", "b")}):
        assert turns_of({"prompt": "u", **double})[0] == talk
    for names in (("messages", "conversations"), ("response", "completion")):
        with refused(DataError, *names):
            read_example({"prompt": "p", names[0]: say("u", "a"), names[1]: say("u", "b")}, FIELDS)
    with refused(DataError, "text"):
        read_example({"messages": talk}, replace(FIELDS, shape="text"))


@pytest.mark.parametrize("flag", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("nothing", [0, 0.0, False])
def test_turns_can_be_left_out(flag: str, nothing: object) -> None:
    talk = say("q", "WRONG", "sure?", "4")
    talk[1][flag], talk[3][flag], talk[0][flag], talk[2][flag] = nothing, True, nothing, None
    dialect = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"], flag: m[flag]} for m in talk]
    for turns in (talk, dialect):
        example = read_example({"messages": turns}, FIELDS)
        assert isinstance(example, Conversation)
        assert (example.messages, example.left_out) == (say("q", "WRONG", "sure?", "4"), {1} | {0})
        pair = read_pair({"chosen": turns, "rejected": say("q", "WRONG", "sure?", "5")}, FIELDS)
        assert isinstance(pair[0], Conversation)
        assert pair[0].num_given == 3


@pytest.mark.parametrize(
    ("index", "flags", "names"),
    [
        (1, {"weight": 0.5}, ("message 2", "weight", 0.5)),
        (1, {"train": "no"}, ("message 2", "train", "'no'")),
        (0, {"loss": True}, ("message 1", "loss", "user")),
        (1, {"weight": 0, "train": True}, ("message 2", "weight", "train")),
        (1, {"mask": True}, ("message 2", "mask")),
        (1, {"training_detail": []}, ("message 2", "training_detail")),
        (1, {"weight": 0}, ("assistant turns", 0)),
    ],
)
def test_flags_that_cannot_be_followed(index: int, flags: dict[str, Any], names: tuple[object, ...]) -> None:
    talk = say("q", "a")
    talk[index] |= flags
    with refused(DataError, "field messages", *names):
        read_example({"messages": talk}, FIELDS)


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": say("q", "a")},
        {"conversations": shared_gpt(("human", "q"), ("gpt", "a"))},
        {"prompt": "q", "response": "a"},
        {"prompt": say("q"), "chosen": "a", "rejected": "b"},
        {"chosen": say("q", "a"), "rejected": say("q", "b")},
    ],
)
def test_system_message_beside_the_turns(name: str, record: dict[str, Any]) -> None:
    messages, num_given = turns_of({**record, name: "s"})
    assert messages == [{"role": "system", "content": "s"}, *say("q", "a")]
    assert num_given in ((2,) if "prompt" in record else (0, 1))
    assert turns_of({**record, name: ""}) == turns_of({**record, name: None}) == turns_of(record)
    if "chosen" in record:
        pair = read_pair({**record, name: "s"}, FIELDS)
        assert all(isinstance(side, Conversation) and side.messages[0]["content"] == "s" for side in pair)


ALPACA = Fields(prompt="instruction", response=("output",))


def test_input_of_an_instruction_is_part_of_the_prompt() -> None:
    example = read_example({"instruction": "Add.", "input": "2 + 3", "output": "5", "system": "s"}, ALPACA)
    assert isinstance(example, Conversation)
    assert [message["content"] for message in example.messages] == ["s", "Add.\n2 + 3", "5"]
    example = read_example({"instruction": "Add.", "input": "2 + 3", "output": "5"}, ALPACA)
    assert isinstance(example, Conversation)
    assert example.plain == PlainText("fields instruction and output", "Add.\n2 + 3", "5")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"system": 3}, ("field system", "int")),
        ({"system": "s", "system_prompt": "t"}, ("system", "system_prompt")),
        ({"messages": [{"role": "system", "content": "x"}, *say("q", "a")], "system": "s"}, ("field system", "messages")),
        ({"messages": None, "text": "t", "system": "s"}, ("field system", "field text")),
        ({"messages": None, "chosen": "t", "system": "s"}, ("field system", "field chosen")),
        ({"history": [["a", "b"]]}, ("field history",)),
        ({"images": ["a.png"]}, ("field images",)),
        ({"functions": [{"name": "f"}]}, ("field functions",)),
        ({"mask": "User"}, ("field mask",)),
        ({"label": False}, ("field label",)),
        ({"ended": "no"}, ("field ended", "'no'")),
        ({"finish_reason": 3}, ("field finish_reason", 3)),
    ],
)
def test_what_would_be_lost_is_refused(more: dict[str, Any], names: tuple[object, ...]) -> None:
    with refused(DataError, *names):
        read_example({"messages": say("q", "a"), **more}, FIELDS)


@pytest.mark.parametrize(
    ("more", "ended"),
    [({}, True), ({"ended": False}, False), ({"finish_reason": "length"}, False), ({"finish_reason": "stop"}, True)],
)
def test_answer_that_was_cut_off(more: dict[str, Any], ended: bool) -> None:
    records: list[dict[str, Any]] = [SHAPES["text"], SHAPES["messages"], SHAPES["prompt"]]
    for record in records:
        example = read_example(record | more, FIELDS)
        assert example.ended == ended
        plain = example.plain if isinstance(example, Conversation) else example
        assert plain is None or plain.ended == ended
    unlearnt = [*say("q", "a", "q"), {"role": "assistant", "content": "b", "weight": 0}]
    assert read_example({"messages": unlearnt, "ended": False}, FIELDS).ended, "the answer that is learnt has ended"
    if not ended:
        with refused(DataError, "ended"):
            read_pair(SHAPES["preference"] | more, FIELDS)


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_dialects_of_a_conversation_are_the_same(name):
    openai = [{"role": "system", "content": "s"}, *say("q", "a")]
    openai += [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "b"}]
    others = [
        shared_gpt(("system", "s"), ("human", "q"), ("gpt", "a"), ("tool", "3"), ("gpt", "b")),
        shared_gpt(("system", "s"), ("user", "q"), ("assistant", "a"), ("observation", "3"), ("assistant", "b")),
        [{**message, "from": None, "name": None} for message in openai],
    ]
    for other in others:
        assert turns_of({name: other}) == (openai, 0)


@pytest.mark.parametrize("value", [json.dumps(CALL), json.dumps([CALL])])
def test_function_call_becomes_a_tool_call(value):
    messages, _ = turns_of({"conversations": shared_gpt(("human", "q"), ("function_call", value), ("observation", "1"))})
    assert messages[1] == {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    assert messages[2] == {"role": "tool", "content": "1"}


@pytest.mark.parametrize("answer", ["r", [{"role": "assistant", "content": "r"}], shared_gpt(("gpt", "r"))])
@pytest.mark.parametrize("prompt", ["p", say("p"), shared_gpt(("human", "p"))])
@pytest.mark.parametrize("name", ["response", "completion", "chosen"])
def test_prompt_and_answer_are_each_a_text_or_messages(prompt, answer, name):
    example = read_example({"prompt": prompt, name: answer}, FIELDS)
    assert isinstance(example, Conversation)
    assert (example.messages, example.num_given) == (say("p", "r"), 1)
    as_texts = PlainText(f"fields prompt and {name}", "p", "r") if prompt == "p" and answer == "r" else None
    assert example.plain == as_texts


def test_answers_in_a_prompt_are_given():
    assert turns_of({"prompt": say("a", "b", "c"), "completion": "d"}) == (say("a", "b", "c", "d"), 3)


def test_whole_conversation_as_an_answer_holds_the_prompt_once():
    system = [{"role": "system", "content": "s"}]
    assert turns_of({"prompt": "p", "chosen": [*system, *say("p", "r")]}) == ([*system, *say("p", "r")], 2)
    with refused(DataError, "field chosen", "prompt"):
        read_example({"prompt": "p", "chosen": say("q", "r")}, FIELDS)
    result = {"role": "tool", "content": "1"}
    called = [{"role": "assistant", "tool_calls": [CALL]}]
    messages = [*say("p"), *called, result, {"role": "assistant", "content": "b"}]
    assert turns_of({"prompt": messages[:2], "response": messages[2:]}) == (messages, 2)


@pytest.mark.parametrize("value", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("shape", [{"messages": say("q", "a")}, {"prompt": "q", "response": "a"}])
def test_tools_are_a_list_or_its_json(shape, value):
    example = read_example({**shape, "tools": value}, FIELDS)
    assert isinstance(example, Conversation)
    assert example.tools == TOOLS
    for nothing in (None, [], "", " ", "[]", "null"):
        none = read_example({**shape, "tools": nothing}, FIELDS)
        assert isinstance(none, Conversation)
        assert none.tools is None


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"messages": []}, ("field messages", 0)),
        ({"conversations": "x"}, ("field conversations", "list")),
        ({"messages": say("q")}, ("field messages", "assistant turns", 0)),
        ({"messages": [*say("q"), {"role": "robot", "content": "x"}]}, ("field messages", "message 2", "role", "'robot'")),
        ({"messages": [*say("q", "a"), {"content": "x"}]}, ("field messages", "message 3", "role", None)),
        ({"messages": [{"role": "user", "content": 3}]}, ("field messages", "message 1", "content", 3)),
        ({"messages": [*say("q"), {"role": "assistant"}]}, ("field messages", "message 2", "content", "null")),
        ({"conversations": shared_gpt(("robot", "x"))}, ("field conversations", "message 1", "from", "'robot'")),
        ({"conversations": shared_gpt(("gpt", None))}, ("field conversations", "message 1", "content", "null")),
        ({"conversations": shared_gpt(("function_call", "{"))}, ("message 1", "function_call", "JSON")),
        ({"conversations": shared_gpt(("function_call", None))}, ("message 1", "function_call", "JSON")),
        ({"conversations": shared_gpt(("function_call", "{}"))}, ("message 1", "tool_calls", "list")),
        ({"conversations": shared_gpt(("function_call", "[]"))}, ("message 1", "content", "null")),
        ({"prompt": [], "response": "r"}, ("field prompt", 0)),
        ({"prompt": "p", "response": []}, ("field response", 0)),
        ({"prompt": "p", "response": 3}, ("field response",)),
        ({"prompt": 3, "response": "r"}, ("field prompt",)),
        ({"prompt": "p", "response": say("p")}, ("prompt and response", "assistant turns", 0)),
        (
            {"prompt": say("p", "r"), "response": [{"role": "tool", "content": "1"}]},
            ("prompt and response", "assistant turns", 0),
        ),
        ({"messages": say("q", "a"), "tools": "{"}, ("field tools", "JSON")),
        ({"messages": say("q", "a"), "tools": {"name": "f"}}, ("field tools", "list")),
        ({"messages": say("q", "a"), "tools": "{}"}, ("field tools", "list")),
        ({"messages": say("q", "a"), "tools": ["f"]}, ("field tools", "list")),
        ({"messages": say("q", "a"), "tools": 0}, ("field tools", "list")),
    ],
)
def test_bad_records_name_field_and_message(record, names):
    with refused(DataError, *names):
        read_example(record, FIELDS)


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({"messages": say("q", "a")}, ("chosen", "messages")),
        (
            {"chosen": "a", "rejected": None},
            ("rejected", "chosen"),
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, ("chosen and rejected", "equal")),
        ({"chosen": "a b", "rejected": "a b"}, ("chosen and rejected", "equal")),
        ({"chosen": say("q", "a"), "rejected": say("q", "a")}, ("chosen and rejected", "equal")),
        ({"prompt": "p", "chosen": "a", "rejected": say("p", "a")}, ("chosen and rejected", "equal")),
        ({"chosen": "a", "rejected": say("q", "a")}, ("text", "list", "prompt")),
        ({"chosen": say("q", "a"), "rejected": say("x", "b")}, ("message 1",)),
        ({"chosen": say("q", "a", "r", "b"), "rejected": say("q", "a", "x", "b")}, ("message 3",)),
        ({"chosen": say("q", "a"), "rejected": say("q", "a", "x", "b")}, ("message 3",)),
        ({"chosen": say("q", "a"), "rejected": [*say("q", "a"), *say("", "b")[1:]]}, ("message 3",)),
        ({"chosen": say("q", "a"), "rejected": [*say("q"), *say("x", "b")]}, ("message 2",)),
        ({"prompt": "p", "chosen": "a", "rejected": []}, ("field rejected", 0)),
        ({"prompt": "p", "chosen": 1, "rejected": "a"}, ("field chosen",)),
        ({"chosen": say("q", "a"), "rejected": say("q")}, ("field rejected", "assistant turns", 0)),
    ],
)
def test_bad_preferences(record, names):
    with refused(DataError, *names):
        read_pair(record, FIELDS)


def test_all_that_both_sides_share_is_given():
    chosen, rejected = read_pair({"chosen": say("a", "b", "c", "d"), "rejected": say("a", "b", "c", "e", "f", "g")}, FIELDS)
    assert isinstance(chosen, Conversation)
    assert isinstance(rejected, Conversation)
    assert (chosen.num_given, rejected.num_given) == (3, 3)
    assert (len(chosen.messages), len(rejected.messages)) == (4, 6)


def test_every_field_that_is_read_is_among_the_names():
    """Parquet readers load these columns and no others."""
    assert {"text", "messages", "system", "tools", "ended", "label", "images"} < set(FIELDS.names)
    record = dict.fromkeys(FIELDS.names)
    with refused(DataError, "field text"):
        read_example(record, FIELDS)
