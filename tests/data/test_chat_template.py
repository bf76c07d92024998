"""Chat templates render to the same text as transformers renders them to."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from helpers import CHATML, refused, say
from unmask.data.chat_template import ChatTemplate
from unmask.errors import DataError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <a> & 'b' é", "parameters": {"x": [1, 2.5]}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": 1, "text": "é<b>"}}}]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": say("Hello", "Hi.", " And?  "),
    "system": [{"role": "system", "content": "Be brief."}, *say("Hello")],
    "tools": [
        *say("1 + 2?"), {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "reasoning": [*say("q"), {"role": "assistant", "content": "a", "reasoning": "because"}, *say("again")],
}  # fmt: skip
TEMPLATES = {
    "chatml": CHATML,
    "llama": """{{- bos_token }}
{%- set date = date_string if date_string is defined else "26 Jul 2024" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
Today: {{ date }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}<|eot|>
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- for arg_name, arg_val in message.tool_calls[0].function.arguments | items %}
            {{- arg_name ~ '="' ~ arg_val ~ '"' }}{% if not loop.last %}, {% endif %}
        {%- endfor %}
    {%- else %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|h|>assistant\\n\\n' }}{% endif %}
""",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.reasoning_content is string and loop.index0 > 0 %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n' }}
    {%- endif %}
    {{- message.role + ':' + content.lstrip('\\n') + ns.last_query_index|string }}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' ~ (tool_call.arguments | tojson) ~ '}' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}<think>\\n\\n</think>{% endif %}
""",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}"
    "{% endif %}{{ m.content }}\n  {% if true %}\n  x\n  {% endif %}{% endfor %}{{ documents }}{{ thinking }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set a = 1 %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ a }}{% endfor %}",
    "json": "{{ messages | tojson(indent=2, sort_keys=true) }}"
    "{{ dict(a=1, b='é') | tojson(separators=(',', ':'), ensure_ascii=true) }}"
    "{{ messages[0].thinking }}{{ dict.fromkeys(['x']) }}",
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if conversation == "tools" else None
    options: dict[str, Any]
    for prompted, options in ((False, {}), (True, {"enable_thinking": False})):
        (expected,), _ = render_jinja_template(
            [messages], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompted, **TOKENS, **options
        )
        template = ChatTemplate({"default": TEMPLATES[name]}, TOKENS)
        assert template.render(messages, tools=tools, add_generation_prompt=prompted, variables=options) == expected


def render(source: str, **variables: Any) -> str:
    return ChatTemplate({"default": source}, TOKENS).render(
        say("a"), tools=None, add_generation_prompt=False, variables=variables
    )


def test_time_is_that_of_the_clock() -> None:
    assert render("{{ strftime_now('%Y') }}") in (datetime.now().strftime("%Y"), str(datetime.now().year - 1))


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system turns') }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{% if %}",
        "{{ namespace(__init__=1) }}", "{% set ns = namespace() %}{% set ns._x = 1 %}", "{{ messages[5].content }}",
        "{{ dict.__base__ }}{{ dict.mro() }}",
    ],
)  # fmt: skip
def test_what_a_template_refuses_or_may_not_do_is_an_error(source: str) -> None:
    with refused(DataError):
        render(source)


def test_named_templates_are_chosen_by_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    options: dict[str, Any] = {"add_generation_prompt": False, "variables": {}}
    assert template.render(say("a"), tools=None, **options) == "plain"
    assert template.render(say("a"), tools=TOOLS, **options) == "tools"
    with refused(DataError, "rag", "'default'"):
        ChatTemplate({"rag": "x"}, {}).render(say("a"), tools=None, **options)


def test_variables_take_the_place_of_named_tokens() -> None:
    assert render("{{ bos_token }}{{ eos_token }}", bos_token="!") == "!</s>"


def test_fields_that_are_none_are_left_out() -> None:
    template = ChatTemplate({"default": "{{ messages | tojson }}"}, {})
    messages = [{"role": "assistant", "content": None, "tool_calls": CALL[:0]}]
    rendered = template.render(messages, tools=None, add_generation_prompt=False, variables={})
    assert rendered == '[{"role": "assistant", "tool_calls": []}]'
