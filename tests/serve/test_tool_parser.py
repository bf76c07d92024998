"""Reading calls: what is cut how does not matter, what was called comes out, and what is no call stays text."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unmask.serve.tool_parser import CallArguments, CallParser, CallStart, Content, Event

WEATHER = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>'
PIECES = (
    *(
        "<",
        "<tool",
        "<tool_call>",
        "</tool_call>",
        "</tool",
        "[",
        "]",
        "{",
        "}",
        ", ",
        ";",
        "\n",
        "  ",
        "a",
        '"',
        "\\",
        "é",
        "[]",
    ),
    *('{"name"', '{"name": "f", "arguments": ', '{"name": "g", "parameters": {}', '{"a": "}"}', '{"b": ["<tool_call>"]}', CALL),
)
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
plain_texts = (
    st.lists(st.sampled_from([*PIECES, "x <tool_"]), max_size=12).map("".join).filter(lambda t: "<tool_call>" not in t)
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["</tool_call>", '"}', "\\", "<tool_call>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
calls = st.lists(st.tuples(st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True), arguments), min_size=1, max_size=4)


class Every:
    """All names."""

    def __contains__(self, name: object) -> bool:
        return True


def merged(events: list[Event]) -> list[Event]:
    """Neighbours of one kind as one event."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Content) and isinstance(last, Content):
            out[-1] = Content(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            out[-1] = CallArguments(last.index, last.text + event.text)
        else:
            out.append(event)
    return out


def parse(*pieces: str, marked: bool = True) -> list[Event]:
    parser = CallParser(Every(), marked=marked)
    events = [event for piece in pieces for event in parser.push(piece)]
    events += parser.finish()
    assert parser.num_calls == sum(isinstance(event, CallStart) for event in events)
    assert all(not isinstance(event, Content | CallArguments) or event.text for event in events), "no empty event"
    return merged(events)


def content(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def called(events: list[Event]) -> list[tuple[str, Any]]:
    names = [event.name for event in events if isinstance(event, CallStart)]
    joined = ["".join(e.text for e in events if isinstance(e, CallArguments) and e.index == i) for i in range(len(names))]
    return [(name, json.loads(text)) for name, text in zip(names, joined, strict=True)]


def written(made: list[tuple[str, Any]], style: str) -> str:
    objects = [json.dumps({"name": name, "arguments": args}, ensure_ascii=False) for name, args in made]
    if style == "list":
        return f"<tool_call>[{', '.join(objects)}]</tool_call>"
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)


@given(text=texts, places=st.lists(st.integers(0, 200), max_size=6), marked=st.booleans())
@example(text=f"Well. \n{CALL}\n\n{CALL}\n", places=list(range(0, 200, 3)), marked=True)
def test_events_do_not_depend_on_the_pieces(text, places, marked):
    cuts = [0, *sorted(place for place in places if place < len(text)), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
    whole = parse(text, marked=marked)
    assert parse(*pieces, marked=marked) == whole
    assert parse(*text, marked=marked) == whole


@given(text=plain_texts, marked=st.booleans())
def test_text_that_neither_has_a_marker_nor_begins_as_a_call_is_unchanged(text, marked):
    if re.match(r'\s*(```(json)?\s*)?\[?\s*\{\s*"name"', text) is None:
        assert parse(*text, marked=marked) == ([Content(text)] if text else [])


@given(
    made=calls, style=st.sampled_from(["hermes", "list"]), before=st.sampled_from(["", "I will ask. \n", "<b", "<tool_call"])
)
def test_calls_come_out_as_they_were_made(made, style, before):
    events = parse(*(before + written(made, style)))
    assert called(events) == made
    assert content(events) == before.rstrip()


@given(made=calls)
def test_llama_calls_come_out_as_they_were_made(made):
    name, args = made[0]
    assert called(parse(*json.dumps({"name": name, "parameters": args}), marked=False)) == [(name, args)]


@given(text=texts)
def test_nothing_but_the_form_of_calls_is_lost(text):
    """Every character that does not occur in the form is still there, in names, arguments or content, in order."""
    form = set('<tool_call></tool_call> \n[{"name": , "arguments": "parameters": }];')
    kept = "".join(event.name if isinstance(event, CallStart) else event.text for event in parse(text))
    assert [char for char in kept if char not in form] == [char for char in text if char not in form]


def test_name_and_arguments_are_handed_on_as_they_come():
    parser = CallParser(Every())
    assert parser.push("Let me see. ") == [Content("Let me see.")]
    assert parser.push("\n<tool") == []
    assert parser.push('_call>\n{"name": "get_weather", "arg') == []
    assert parser.push('uments": ') == [], "not before it is certain that an object follows"
    assert parser.push('{"ci') == [CallStart(0, "get_weather"), CallArguments(0, '{"ci')]
    assert parser.num_calls == 1
    assert parser.push('ty": "Par') == [CallArguments(0, 'ty": "Par')]
    assert parser.push('is"}}\n</tool') == [CallArguments(0, 'is"}')], "the closing brace of the call is none of theirs"
    assert parser.push("_call>") == []
    assert parser.finish() == []


def test_text_is_held_back_only_while_it_may_begin_a_call():
    parser = CallParser(Every())
    assert parser.push("a <") == [Content("a")]
    assert parser.push("b> <tool_cal") == [Content(" <b>")]
    assert parser.push("led> ") == [Content(" <tool_called>")]
    assert parser.finish() == [Content(" ")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "a \n<tool_call>\n{",
        '<tool_call>\n{"name": "get_wea',
        '<tool_call>\n{"name": "get_weather", "arguments": ',
        "<tool_call>nothing</tool_call> more",
        '<tool_call>{"name": "two words", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        '<tool_call>{"arguments": {}, "name": "f"}</tool_call>\n',
    ],
)
def test_what_is_no_call_is_content(text):
    assert parse(*text) == [Content(text)]


@pytest.mark.parametrize("cut", range(CALL.index("{", 20) + 1, CALL.index("}")))
def test_cut_within_the_arguments(cut):
    place = CALL.index(WEATHER)
    assert parse(CALL[:cut]) == [CallStart(0, "get_weather"), CallArguments(0, CALL[place:cut])]


@pytest.mark.parametrize("cut", range(CALL.index("}") + 1, len(CALL)))
def test_cut_behind_the_arguments(cut):
    assert parse(CALL[:cut]) == [CallStart(0, "get_weather"), CallArguments(0, WEATHER)]


def test_malformed_and_then_a_call():
    start, args = CallStart(0, "get_weather"), CallArguments(0, WEATHER)
    assert parse(f"I use <tool_call> for it.\n{CALL}") == [Content("I use <tool_call> for it."), start, args]
    assert parse(f"<tool_call>x</tool_call>\n{CALL}") == [Content("<tool_call>x</tool_call>"), start, args]


def test_behind_a_call():
    start, args = CallStart(0, "get_weather"), CallArguments(0, WEATHER)
    assert parse(f"{CALL}\n\n") == [start, args]
    assert parse(f"{CALL}\nDone. ") == [start, args, Content("\nDone. ")]
    extra = CALL.replace('"}}', '"}, "id": 1}')
    assert parse(extra) == [start, args, Content(', "id": 1}\n</tool_call>')]
    again = [CallStart(1, "get_weather"), CallArguments(1, WEATHER)]
    assert parse(CALL.removesuffix("</tool_call>") + CALL) == [start, args, *again], "a call that is not closed"


def test_an_empty_list_is_no_call():
    assert parse("I cannot. <tool_call>[]</tool_call>") == [Content("I cannot.")]


@pytest.mark.parametrize("marked", [True, False])
def test_an_answer_that_is_a_call_needs_no_marker(marked):
    events = [CallStart(0, "f"), CallArguments(0, '{"a": "]}"}')]
    call = '{"name": "f", "arguments": {"a": "]}"}}'
    for text in (
        call,
        f" {call}",
        f"[{call}]",
        f"```json\n[{call}]\n```",
        f"```\n{call}",
        f'{{"type": "function", "function": {call}}}',
    ):
        assert merged(parse(*text, marked=marked)) == events, text
    two = merged(parse(*f"[{call}, {call}]", marked=marked))
    assert two == [*events, CallStart(1, "f"), CallArguments(1, '{"a": "]}"}')]


@pytest.mark.parametrize("marked", [True, False])
def test_an_answer_that_begins_as_a_call_but_is_none(marked):
    for text in (
        '{"name": "Ada", "age": 36}',
        '[{"name": "Ada"}]',
        '```json\n{"name": "Ada"',
        'See: {"name": "f", "arguments": {}}',
    ):
        assert parse(*text, marked=marked) == [Content(text)]


@pytest.mark.parametrize("text", [CALL, '{"name": "get_weather", "arguments": {"city": "Paris"}}', f"So. \n{CALL}\n{CALL}"])
def test_a_call_of_an_unknown_function_is_content(text):
    parser = CallParser(["get"])
    assert merged([event for char in text for event in parser.push(char)] + parser.finish()) == [Content(text)]
