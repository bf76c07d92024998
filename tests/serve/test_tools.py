"""Tools: formats found from templates, conversations as models want them, and what the grammars let through."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import CHATML, SPECIAL_TOKENS, make_tokenizer, refused
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.engine.grammar import Grammar, GrammarCompiler, GrammarState
from unmask.errors import RequestError
from unmask.models.weights.hub import resolve, tokenizer_folder
from unmask.serve.protocol.messages import FunctionSpec
from unmask.serve.tool_parser import CallArguments, CallStart, Content
from unmask.serve.tools import ToolChoice, ToolFormat, tool_format

AUTO, NONE, REQUIRED = ToolChoice(), ToolChoice("none"), ToolChoice("required")
SHOWN = "{% for tool in tools or [] %}{{ '<|im_start|>system\\n' + (tool | tojson) + '<|im_end|>\\n' }}{% endfor %}"
ASKED = (
    '{% if tools %}{{ \'<|im_start|>system\\nFor each call:\\n<tool_call>\\n{"name": <name>, "arguments": <object>}\' }}'
    "{{ '\\n</tool_call><|im_end|>\\n' }}{% endif %}"
)
# As Qwen's: trips over content that is no text, writes calls and results.
HERMES = (
    SHOWN + "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + "
    "'\\n</tool_response><|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ ('\\n' if m.content or not loop.first else '') + '<tool_call>\\n{\"name\": \"' + "
    "call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 3.1's: one call at a time, and a list of them, empty or not, is no answer.
LLAMA = (
    SHOWN
    + "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('single') }}"
    '{% endif %}{% set call = m.tool_calls[0].function %}{{ \'<|im_start|>assistant\\n{"name": "\' + call.name + '
    "'\", \"parameters\": ' + (call.arguments | tojson) + '}<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\\n' + m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
TEMPLATES = {"hermes": HERMES, "list": CHATML, "llama": LLAMA}

WEATHER = FunctionSpec(
    name="get_weather",
    description="Weather in a city.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
    },
)
TIME = FunctionSpec(name="get")
FUNCTIONS = (WEATHER, TIME)
CITY = '{"city": "Oslo", "unit": "c"}'
CALL = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo","unit":"c"}'}}
CALL_TIME = {"id": "b", "type": "function", "function": {"name": "get", "arguments": ""}}
HISTORY = [
    {"role": "user", "content": "Weather and time?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL_TIME]},
    {"role": "tool", "tool_call_id": "a", "content": "rain"},
    {"role": "tool", "tool_call_id": "b", "content": "noon"},
    {"role": "assistant", "content": "Rain, noon.", "tool_calls": None},
]


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>' for name, text in calls)


def listed(*calls: tuple[str, str]) -> str:
    return "<tool_call>[" + ", ".join(f'{{"name": "{name}", "arguments": {text}}}' for name, text in calls) + "]</tool_call>"


def llama(*calls: tuple[str, str]) -> str:
    return "".join(f'{{"name": "{name}", "parameters": {text}}}' for name, text in calls)


WRITERS: dict[str, Callable[..., str]] = {"hermes": hermes, "list": listed, "llama": llama}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Tokenizer]:
    made: dict[str | None, Tokenizer] = {}

    def get(template: str | None) -> Tokenizer:
        if template not in made:
            made[template] = make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=template)
        return made[template]

    return get


@pytest.fixture(scope="module")
def compiler(make: Callable[[str | None], Tokenizer]) -> GrammarCompiler:
    tokenizer = make(CHATML)
    return GrammarCompiler(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def formats(make: Callable[[str | None], Tokenizer]) -> dict[str, ToolFormat]:
    return {name: tool_format(make(template)) for name, template in TEMPLATES.items()}


def rendered(tokenizer: Tokenizer, messages: Any, functions: Any = (), choice: ToolChoice = AUTO) -> str:
    rewritten, tools = tool_format(tokenizer).messages(messages, functions, choice)
    return tokenizer.decode(tokenizer.chat(rewritten, add_generation_prompt=False, tools=tools), skip_special=False)


def walked(grammar: Grammar, tokenizer: Tokenizer, text: str) -> GrammarState | None:
    """The state after a text, one character at a time where there is a choice; None where the grammar does not allow it."""
    state = grammar.start()
    while text:
        forced = state.forced()
        piece = tokenizer.decode(forced[:1]) if forced else text[0]
        ids = forced[:1] or tokenizer.encode(piece)
        if not text.startswith(piece):
            return None
        for id_ in ids:
            if not state.accepts(id_):
                return None
            state.advance(id_)
        text = text[len(piece) :]
    return state


class Checker:
    """Texts against one grammar."""

    def __init__(
        self, format_: ToolFormat, compiler: GrammarCompiler, tokenizer: Tokenizer, choice: ToolChoice, parallel: bool
    ):
        grammar = format_.compile(compiler, FUNCTIONS, choice, parallel=parallel)
        assert grammar is not None
        self.grammar, self.tokenizer = grammar, tokenizer

    def whole(self, text: str) -> bool:
        state = walked(self.grammar, self.tokenizer, text)
        return state is not None and state.may_end

    def begins(self, text: str) -> bool:
        return walked(self.grammar, self.tokenizer, text) is not None


@pytest.fixture(scope="module")
def check(formats, compiler, make) -> Callable[..., Checker]:
    made: dict[Any, Checker] = {}

    def get(style: str, choice: ToolChoice = AUTO, parallel: bool = True) -> Checker:
        key = (style, choice, parallel)
        if key not in made:
            made[key] = Checker(formats[style], compiler, make(CHATML), choice, parallel)
        return made[key]

    return get


# --- formats and conversations


@pytest.mark.parametrize("style", TEMPLATES)
def test_history_is_written_in_the_familys_format(make, style):
    text = rendered(make(TEMPLATES[style]), HISTORY)
    both = [("get_weather", CITY), ("get", "{}")]
    if style == "llama":
        assert all(f"<|im_start|>assistant\n{llama(call)}<|im_end|>" in text for call in both), "one call a turn"
        assert "ipython\nrain" in text
    else:
        assert f"<|im_start|>assistant\n{WRITERS[style](*both)}<|im_end|>" in text
        assert "<tool_response>\nrain\n</tool_response>" in text
    assert text.index("rain") < text.index("noon") < text.index("assistant\nRain, noon.")
    assert "None" not in text


def test_results_in_a_row_are_one_turn_where_the_template_has_none(make):
    text = rendered(make(CHATML), HISTORY)
    responses = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    assert f"<|im_start|>user\n{responses}<|im_end|>" in text
    assert "<|im_start|>tool" not in text


def test_text_before_calls_and_arguments_that_are_no_json(make):
    call = {"function": {"name": "get", "arguments": '{"cut'}}
    text = rendered(make(CHATML), [HISTORY[0], {"role": "assistant", "content": "Well.", "tool_calls": [call]}])
    assert 'Well.\n<tool_call>[{"name": "get", "arguments": {"cut}]</tool_call>' in text


@pytest.mark.parametrize("template", [CHATML, HERMES])
def test_arguments_that_would_exhaust_the_stack(make, template):
    def asked(arguments: str) -> str:
        call = {"function": {"name": "get", "arguments": arguments}}
        return rendered(make(template), [HISTORY[0], {"role": "assistant", "tool_calls": [call]}])

    assert "{}" * 200 in asked(json.dumps({"a": "{}" * 200 + "[" * 200}))
    assert "[" * 99 in asked('{"a": ' + "[" * 99 + "]" * 99 + "}")
    for text in ("[" * 100_000, '{"a": ' + "[" * 100 + "]" * 100 + "}"):
        with refused(RequestError, "'get'", 100):
            asked(text)


@pytest.mark.parametrize("style", ["hermes", "llama"])
def test_a_template_that_shows_tools_gets_them(make, style):
    rewritten, tools = tool_format(make(TEMPLATES[style])).messages(HISTORY[:1], FUNCTIONS, AUTO)
    assert rewritten == HISTORY[:1]
    assert tools is not None
    assert tools[0] == {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather in a city.", "parameters": WEATHER.parameters},
    }
    assert tools[1] == {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
    assert tool_format(make(TEMPLATES[style])).messages(HISTORY[:1], FUNCTIONS, NONE)[1] is None


def test_smollm2_is_told_of_tools_in_its_published_words(make):
    format_ = tool_format(make(CHATML))
    rewritten, tools = format_.messages(HISTORY[:1], FUNCTIONS, AUTO)
    assert tools is None
    assert [message["role"] for message in rewritten] == ["system", "user"]
    prompt = rewritten[0]["content"]
    assert prompt.startswith(
        "You are an expert in composing functions. You are given a question and a set of possible functions. \n"
    )
    shown = re.search(r"<tools>(.*)</tools>", prompt)
    assert shown is not None
    assert [tool["function"]["name"] for tool in json.loads(shown[1])] == ["get_weather", "get"]
    assert prompt.endswith("... (more tool calls as required)\n]</tool_call>")
    given_text = [{"role": "system", "content": "Be brief."}, *HISTORY[:1]]
    assert format_.messages(given_text, FUNCTIONS, AUTO)[0][0]["content"] == f"Be brief.\n\n{prompt}"
    assert format_.messages(given_text, FUNCTIONS, NONE)[0] == given_text
    assert format_.messages(given_text, (), AUTO)[0] == given_text


def test_a_template_without_system_turns_has_tools_in_the_first_users(make):
    rewritten, _ = tool_format(make(NO_SYSTEM)).messages(HISTORY[:1], FUNCTIONS, AUTO)
    assert [message["role"] for message in rewritten] == ["user"]
    assert rewritten[0]["content"].endswith("]</tool_call>\n\nWeather and time?")


def test_a_template_that_only_shows_tools(make):
    """As SmolLM3's: it asks for calls in Hermes style and does not write those of the history."""
    text = rendered(make(SHOWN + ASKED + CHATML), HISTORY, FUNCTIONS)
    assert hermes(("get_weather", CITY), ("get", "{}")) in text
    assert "<tool_response>\nrain" in text
    as_list = ASKED.replace('\\n{"name', '[{"name')
    assert listed(("get_weather", CITY), ("get", "{}")) in rendered(make(SHOWN + as_list + CHATML), HISTORY, FUNCTIONS)


def test_a_template_that_writes_calls_but_no_results(make):
    without = HERMES.replace("for m in messages", "for m in messages if m.role != 'tool'")
    text = rendered(make(without), HISTORY)
    assert "<tool_response>\nrain" in text


def test_templates_that_cannot_be_used(make):
    with refused(RequestError, "chat template"):
        tool_format(make(None))
    with refused(RequestError, "format"):
        tool_format(make(SHOWN + CHATML))


def test_a_marker_that_is_a_control_token(tmp_path, compiler):
    """The format is found all the same; the grammar, which speaks of text, spells the marker with other tokens."""
    specials = (*SPECIAL_TOKENS, "<tool_call>", "</tool_call>")
    tokenizer = make_tokenizer(tmp_path, special_tokens=specials, chat_template=HERMES)
    format_ = tool_format(tokenizer)
    own = GrammarCompiler(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)
    text = hermes(("get", "{}"))
    assert Checker(format_, own, tokenizer, REQUIRED, parallel=True).whole(text)
    assert tokenizer.special_tokens["<tool_call>"] not in tokenizer.encode(text)
    assert "<tool_response>\nrain" in rendered(tokenizer, HISTORY)


# --- rules of functions


@pytest.mark.parametrize("name", ["", "a b", "é", "x" * 65, "a.b", "get\n"])
def test_bad_names_are_refused(formats, name):
    with refused(RequestError, "tools[1].function.name"):
        formats["list"].grammar([TIME, FunctionSpec(name=name)], AUTO, parallel=True)


def test_functions_and_choice_are_checked(formats, compiler):
    with refused(RequestError, "tools[1].function.name", "'get'"):
        formats["list"].grammar([TIME, TIME], NONE, parallel=True)
    with refused(RequestError, "tool_choice", "'other'"):
        formats["list"].compile(compiler, FUNCTIONS, ToolChoice("required", "other"), parallel=True)
    with refused(RequestError, "tool_choice", "required"):
        formats["list"].grammar([], REQUIRED, parallel=True)


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({"type": "string"}, ("type", "'string'", "object")),
        ({"type": "object", "properties": {"a": {"uniqueItems": True}}}, ("#/properties/a",)),
        ({"properties": {"a": {"enum": []}}, "required": ["a"]}, ("#",)),
        ({"properties": 5}, ("#", "properties", "object")),
        ({"properties": {"a": {"minimum": float("nan")}}}, ("JSON",)),
    ],
)
def test_a_schema_that_is_refused_is_named(formats, compiler, parameters, names):
    functions = [TIME, FunctionSpec(name="bad_one", parameters=parameters)]
    with refused(RequestError, "tools[1].function.parameters", "'bad_one'", *names):
        formats["hermes"].compile(compiler, functions, AUTO, parallel=True)


def test_functions_too_complex_together(formats, compiler):
    schema = {
        "type": "object",
        "properties": {f"p{place}": {"enum": ["x" * 50 + str(n) for n in range(99)]} for place in range(99)},
    }
    functions = [FunctionSpec(name=f"f{place}", parameters=schema) for place in range(3)]
    with refused(RequestError, "tools", 3):
        formats["hermes"].compile(compiler, functions, AUTO, parallel=True)


@pytest.mark.parametrize("style", TEMPLATES)
def test_nothing_is_constrained_without_functions_to_call(formats, compiler, style):
    assert formats[style].grammar(FUNCTIONS, NONE, parallel=True) is None
    assert formats[style].grammar([], AUTO, parallel=True) is None
    assert formats[style].compile(compiler, FUNCTIONS, NONE, parallel=True) is None


# --- grammars


@pytest.mark.parametrize("style", TEMPLATES)
def test_auto_lets_text_and_calls_through(check, style):
    write, auto = WRITERS[style], check(style)
    weather, time = ("get_weather", CITY), ("get", "{}")
    for text in (
        "",
        "Hi",
        "a < b",
        "<tool",
        "<tool_call",
        "x </tool_call>",
        "<<tool_ca",
        '{"nam',
        ' {"name": 1}',
        "é\n\n",
        "{}",
    ):
        assert auto.whole(text), text
    for call in (weather, time, ("get_weather", '{"city": "é<tool>"}')):
        assert auto.whole(write(call)), call
    before = [] if style == "llama" else ["It is < so.\n", "<", "<tool_call", "\n\n"]
    for text in before:
        assert auto.whole(text + write(weather, time)), text
        assert not auto.begins(text + "<tool_call>x")
    assert not auto.begins(write(time) + " x")
    assert auto.whole(write(("other", "{}"))) == (style == "llama"), "text, where nothing marks calls"
    assert not auto.whole(write(("get_weather", '{"city": "A"')))


@pytest.mark.parametrize("style", TEMPLATES)
def test_an_answer_that_begins_as_a_call_of_a_function_is_one(check, style):
    auto, key = check(style), "parameters" if style == "llama" else "arguments"
    call = f'{{"name": "get_weather", "{key}": {CITY}}}'
    for text in (
        call,
        f" {call}",
        f"[{call}]",
        f"```json\n[{call}]",
        f"```\n{call}",
        f'{{"type": "function", "function": {call}}}',
    ):
        assert auto.whole(text), text
    assert auto.whole(f"[{call}, {call}]") == (style != "llama")
    assert auto.begins('[{"name": "get_weather"')
    for text in ('{"name": "get_weather"} x', '{"name": "get_weather", "x"', f"{call} x", f"[{call}"):
        assert not auto.whole(text), text
    for text in (
        '{"name": "Ada", "age": 36}',
        '[{"name": "get_weather_2"}]',
        '```json\n{"name": "get',
        f"So: {call}",
        "```py\nx",
    ):
        assert auto.whole(text), text


@pytest.mark.parametrize("style", TEMPLATES)
def test_arguments_follow_the_schema(check, style):
    for choice in (AUTO, REQUIRED, ToolChoice("required", "get_weather")):
        whole = check(style, choice).whole
        write = WRITERS[style]
        assert whole(write(("get_weather", '{"city": "Rome"}')))
        assert not whole(write(("get_weather", "{}"))), "a required argument"
        assert not whole(write(("get_weather", '{"city":"Rome"}'))), "another layout"
        assert not whole(write(("get_weather", '{"city": "Rome", "unit": "k"}')))
        assert not whole(write(("get_weather", '{"city": "Rome", "day": 1}'))), "an argument that is not listed"
        assert not whole(write(("get", '{"a": 1}'))), "there are no parameters"
        assert whole(write(("get", "{}"))) == (choice.name is None)


@pytest.mark.parametrize("style", TEMPLATES)
def test_required_is_calls_only(check, style):
    required, write, time = check(style, REQUIRED), WRITERS[style], ("get", "{}")
    assert required.whole(write(time))
    assert not required.whole("")
    assert not required.begins("Hi")
    assert not required.begins("\n" + write(time))
    assert not required.whole("<tool_call>[]</tool_call>")


@pytest.mark.parametrize("style", ["hermes", "list"])
@pytest.mark.parametrize(
    ("choice", "parallel", "most"),
    [(AUTO, True, 16), (REQUIRED, True, 16), (AUTO, False, 1), (REQUIRED, False, 1), (ToolChoice("required", "get"), True, 1)],
)
def test_at_most_so_many_calls(check, style, choice, parallel, most):
    checker, write = check(style, choice, parallel), WRITERS[style]
    assert checker.whole(write(*[("get", "{}")] * most))
    assert not checker.whole(write(*[("get", "{}")] * (most + 1)))


def test_llama_makes_one_call(check):
    assert not check("llama", REQUIRED).begins(llama(("get", "{}"), ("get", "{}")))


def test_smollm2_may_say_that_it_calls_nothing(check):
    assert check("list").whole("<tool_call>[]</tool_call>")
    assert check("list").whole("None fits. <tool_call>[]</tool_call>")


def test_open_schemas_stay_open(formats, compiler, make):
    """An object without a list of properties, and one that asks for others."""
    names = {"any": {"type": "object"}, "more": {"properties": {}, "additionalProperties": {"type": "integer"}}, "none": {}}
    names["unlisted"] = {"properties": {}, "required": ["x"]}
    names["either"] = {"anyOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {"b": {}}, "required": ["b"]}]}
    functions = [FunctionSpec(name=name, parameters=schema) for name, schema in names.items()]
    grammar = formats["llama"].compile(compiler, functions, REQUIRED, parallel=True)
    assert grammar is not None

    def whole(name: str, text: str) -> bool:
        state = walked(grammar, make(CHATML), llama((name, text)))
        return state is not None and state.may_end

    assert whole("any", '{"x": [1, null]}')
    assert whole("more", '{"x": 1}')
    assert not whole("more", '{"x": "1"}')
    assert whole("either", '{"b": 1}')
    assert not whole("either", "{}")
    assert whole("unlisted", '{"x": 1}')
    assert whole("none", "{}")
    assert not whole("none", '{"x": 1}')
    assert not whole("any", "1")


PARTS = (
    "<",
    "<tool",
    "_call>",
    "<tool_call>",
    ">",
    "a",
    " ",
    "\n",
    hermes(("get", "{}")),
    hermes(("get", "{ }")),
    "é",
    "<tool_call",
)


@given(text=st.lists(st.sampled_from(PARTS), max_size=6).map("".join))
@example(text="<tool_call" + hermes(("get", "{}")))
def test_auto_is_text_without_a_marker_or_text_and_calls(check, text):
    one = re.escape(hermes(("get", "{}")))
    expected = "<tool_call>" not in text or re.fullmatch(f"((?!<tool_call>)[^\0])*{one}(\n{one}){{0,15}}", text) is not None
    assert check("hermes").whole(text) == expected


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_generated_parses(formats, check, style, seed):
    """Random walks: the parser finds calls of the functions, with arguments that are right, and no content."""
    checker, draw = check(style, REQUIRED), random.Random(seed)
    state, ids = checker.grammar.start(), []
    for _ in range(2000):
        allowed = state.allowed().nonzero()[:, 0].tolist()
        ends = [id_ for id_ in allowed if id_ in checker.tokenizer.eos_ids]
        closing = [id_ for id_ in allowed if checker.tokenizer.decode([id_]) in ('"', "}", "]")]
        if ends and draw.random() < 0.5:
            break
        ids.append(draw.choice(closing if closing and draw.random() < 0.3 else [i for i in allowed if i not in ends] or ends))
        state.advance(ids[-1])
        if state.finished:
            break
    assert state.may_end
    parser = formats[style].parser([each.name for each in FUNCTIONS])
    events = [*parser.push(checker.tokenizer.decode(ids)), *parser.finish()]
    assert parser.num_calls >= 1
    assert not any(isinstance(event, Content) for event in events)
    for event, following in zip(events[::2], events[1::2], strict=True):
        assert isinstance(event, CallStart)
        assert isinstance(following, CallArguments)
        arguments = json.loads(following.text)
        assert following.text == json.dumps(arguments, ensure_ascii=False)
        if event.name == "get":
            assert arguments == {}
        else:
            assert event.name == "get_weather"
            assert len(arguments["city"]) <= 8
            assert arguments.get("unit", "c") in ("c", "f")
            assert arguments.keys() <= {"city", "unit"}


def test_the_embedded_model() -> None:
    """Its own tokenizer cuts text at other places than single characters."""
    source: Path | None = tokenizer_folder(resolve("smollm2-135m"))
    assert source is not None
    tokenizer = load_tokenizer(source)
    format_ = tool_format(tokenizer)
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)
    auto = Checker(format_, compiler, tokenizer, AUTO, parallel=True)
    text = "Let me look.\n" + listed(("get_weather", CITY), ("get", "{}"))
    assert auto.whole(text)
    state = auto.grammar.start()
    for id_ in tokenizer.encode("Let me <look>."):
        state.advance(id_)
    assert state.may_end
    assert state.allowed()[list(tokenizer.eos_ids)].all()
    assert rendered(tokenizer, HISTORY[:1], FUNCTIONS).count("<|im_start|>system") == 1
