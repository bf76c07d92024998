"""Fields that clients of other servers send: neutral values pass, what can be done is done, the rest is named."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from asking import HELLO, HTTP
from live import CONTEXT, Live, live, served_model
from openai import OpenAI

from helpers import CHATML
from unmask.engine.llm import LanguageModel
from unmask.serve.protocol.chat import ChatRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NEUTRAL = {
    **{"repetition_penalty": 1.0, "frequency_penalty": 0, "presence_penalty": 0.0, "min_p": 0, "top_k": -1, "top_p": 1},
    **{
        "logit_bias": {},
        "logprobs": False,
        "n": 1,
        "best_of": 1,
        "suffix": "",
        "use_beam_search": False,
        "length_penalty": 1.0,
    },
    **{"truncate_prompt_tokens": None, "ignore_eos": False, "min_tokens": 0, "stop_token_ids": [], "stop": [], "seed": None},
    **{"length_penalty": 1.0},
    **{"skip_special_tokens": True, "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "echo": False},
    **{"prompt_logprobs": None, "guided_json": None, "guided_choice": None, "structured_outputs": None, "functions": []},
    **{"response_format": {"type": "text"}, "early_stopping": False, "add_special_tokens": True, "bad_words": []},
}


def _post(site: Live, path: str = CHAT, **fields: Any) -> Any:
    usual = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"} if path == COMPLETIONS else {}
    return HTTP.post(site.url + path, json={"model": "tiny", "max_tokens": 8, **usual, **fields})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_neutral_values_change_nothing(site: Live, path: str) -> None:
    plain, neutral = _post(site, path), _post(site, path, **NEUTRAL)
    assert neutral.status_code == 200, neutral.text
    assert "x-unmask-ignored-fields" not in neutral.headers
    assert neutral.json()["choices"] == plain.json()["choices"]
    assert _post(site, path, top_k=0, seed=-1, user=3, metadata={"a": 1}).json()["choices"] == plain.json()["choices"]


def test_no_limit_is_the_default_limit() -> None:
    body = ChatRequest.model_validate({"model": "tiny", "messages": HELLO, "max_tokens": -1, "max_completion_tokens": -1})
    assert (body.max_tokens, body.max_completion_tokens) == (None, None)


@pytest.mark.parametrize(
    "fields",
    [{"use_beam_search": True}, {"bad_words": ["a"]}, {"prompt_logprobs": 1}, {"include_stop_str_in_output": True},
     {"web_search_options": {"a": 1}}, {"audio": {"voice": "a"}}, {"function_call": "auto"}, {"best_of": 2},
     {"structured_outputs": {"structural_tag": "{}"}}],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_what_the_answer_would_have_to_heed_is_refused(site: Live, fields: dict[str, Any]) -> None:
    response = _post(site, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in (*fields, "structural_tag", "structured_outputs.structural_tag")


def test_a_number_of_tokens_can_be_forced(site: Live) -> None:
    for fields in ({"min_tokens": 8}, {"ignore_eos": True}):
        assert _post(site, **fields).json()["usage"]["completion_tokens"] == 8
    error = _post(site, min_tokens=9).json()["error"]
    assert error["param"] == "min_tokens"


GUIDED: list[tuple[dict[str, Any], str]] = [
    ({"guided_choice": ['yes "é"', "no"]}, '(yes "é"|no)'),
    ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
    ({"guided_grammar": 'start: "a" "b"'}, "ab"),
    ({"guided_grammar": 'root ::= "a" digit\ndigit ::= [0-9]'}, "a[0-9]"),
    ({"guided_json": {"enum": [17]}}, "17"),
    ({"guided_json": '{"enum": [17]}'}, "17"),
    ({"structured_outputs": {"choice": ["up", "down"]}}, "(up|down)"),
    ({"structured_outputs": {"regex": "a+b"}}, "a+b?"),
    ({"structured_outputs": {"json": {"const": "x"}}}, '"x"'),
    ({"response_format": {"type": "regex", "pattern": "[ab]{2}"}}, "[ab]{2}"),
    ({"response_format": {"type": "grammar", "grammar": 'start: "c"'}}, "c"),
    ({"response_format": {"type": "json_object", "schema": {"enum": [{}]}}}, "{}"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}}}, "1"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "pattern"), GUIDED, ids=lambda value: json.dumps(value)[:40])
def test_guided_answers(site: Live, path: str, fields: dict[str, Any], pattern: str) -> None:
    response = _post(site, path, **fields)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert re.fullmatch(pattern, choice["message"]["content"] if path == CHAT else choice["text"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"response_format": {"type": "regex"}}, "response_format"),
        ({"guided_regex": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "guided_regex"),
    ],
    ids=str,
)
def test_guidance_that_cannot_be_followed(site: Live, fields: dict[str, Any], param: str) -> None:
    response = _post(site, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_the_best_of_several(site: Live) -> None:
    fields = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "logprobs": 0}
    every = _post(site, COMPLETIONS, n=4, **fields).json()["choices"]

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = _post(site, COMPLETIONS, n=2, best_of=4, **fields).json()
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert [choice["text"] for choice in best["choices"]] == [c["text"] for c in sorted(every, key=mean, reverse=True)[:2]]
    assert best["usage"]["completion_tokens"] > sum(len(c["logprobs"]["tokens"]) for c in best["choices"])
    assert _post(site, COMPLETIONS, best_of=2).json()["choices"][0]["logprobs"] is None
    assert _post(site, COMPLETIONS, best_of=2, stream=True).json()["error"]["param"] == "best_of"
    assert _post(site, COMPLETIONS, best_of=1, n=2).json()["error"]["param"] == "best_of"


def test_usage_in_every_chunk(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=20, stream=True, stream_options=options, extra_body={"ignore_eos": True}
    ))  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert len(set(counts)) > 1


def test_an_answer_is_continued(site: Live, tiny: LanguageModel) -> None:
    assert tiny.tokenizer is not None
    begun = [*HELLO, {"role": "assistant", "content": "I am"}]
    asked = {"messages": begun, "continue_final_message": True}
    ids = HTTP.post(f"{site.url}/v1/tokenize", json=asked).json()["tokens"]
    assert ids == tiny.tokenizer.chat(HELLO, add_generation_prompt=True) + tiny.tokenizer.encode("I am")
    text = _post(site, **asked).json()["choices"][0]["message"]["content"]
    assert text == _post(site, COMPLETIONS, prompt=ids).json()["choices"][0]["text"]
    assert _post(site, continue_final_message=True).json()["error"]["param"] == "continue_final_message"
    both = {**asked, "add_generation_prompt": True}
    assert _post(site, **both).json()["error"]["param"] == "add_generation_prompt"
    bare = HTTP.post(f"{site.url}/v1/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()["tokens"]
    assert bare == tiny.tokenizer.chat(HELLO, add_generation_prompt=False)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A model with more context, whose template reads a variable."""
    template = CHATML + "{% if thinking %}{{ thinking }}{% endif %}"
    with live(served_model(tmp_path_factory.mktemp("thinking"), chat_template=template, context=1024)) as running:
        yield running


def test_variables_of_the_chat_template(thinking: Live) -> None:
    def ids(**fields: Any) -> Any:
        return HTTP.post(f"{thinking.url}/v1/tokenize", json={"messages": HELLO, **fields}).json()

    plain, more = ids()["tokens"], ids(chat_template_kwargs={"thinking": "hm<|im_end|>"})["tokens"]
    assert more[: len(plain)] == plain
    assert more[len(plain) :] == HTTP.post(f"{thinking.url}/v1/tokenize", json={"prompt": "hm<|im_end|>"}).json()["tokens"]
    assert _post(thinking, chat_template_kwargs={"thinking": "hm"}).json()["usage"]["prompt_tokens"] > len(plain)
    for name in ("chat_template", "tokenize", "messages"):
        assert ids(chat_template_kwargs={name: "x"})["error"]["param"] == "messages"


def test_a_benchmark_that_fixes_the_number_of_tokens(site: Live) -> None:
    """The bodies that guidellm sends with its defaults: parts of text, a fixed number of tokens, usage in every chunk."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Once"}, {"type": "text", "text": "upon"}]}]
    body = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    fixed = {"stop": None, "ignore_eos": True}
    bodies = {CHAT: {"messages": parts, "max_completion_tokens": 9}, COMPLETIONS: {"prompt": "Once upon", "max_tokens": 9}}
    for path, asked in bodies.items():
        response = HTTP.post(site.url + path, json={**body, **fixed, **asked})
        assert "x-unmask-ignored-fields" not in response.headers
        lines = [line for line in response.text.split("\n") if line.startswith("data: {")]
        assert json.loads(lines[-1].removeprefix("data: "))["usage"]["completion_tokens"] == 9


def test_only_allowed_tools_are_called(thinking: Live) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("first", "second")]
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "second"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    response = _post(thinking, tools=tools, tool_choice=choice, max_tokens=128, parallel_tool_calls=False).json()
    assert [call["function"]["name"] for call in response["choices"][0]["message"]["tool_calls"]] == ["second"]
    allowed["tools"] = [{"type": "function", "function": {"name": "third"}}]
    assert _post(thinking, tools=tools, tool_choice=choice).json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokens_and_back(site: Live, prefix: str) -> None:
    there = HTTP.post(f"{site.url}{prefix}/tokenize", json={"prompt": "Hello wörld", "return_token_strs": True}).json()
    assert "".join(there["token_strs"]).startswith("Hello w")
    assert (there["count"], there["max_model_len"]) == (len(there["tokens"]), CONTEXT)
    back = HTTP.post(f"{site.url}{prefix}/detokenize", json={"tokens": there["tokens"]})
    assert back.json() == {"prompt": "Hello wörld"}
    assert HTTP.post(f"{site.url}{prefix}/detokenize", json={"tokens": [1, 10**9]}).json()["error"]["param"] == "tokens[1]"


def test_a_full_context_is_told_in_the_words_that_frameworks_know(site: Live) -> None:
    error = _post(site, messages=[{"role": "user", "content": "x" * 2 * CONTEXT}]).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"This model's maximum context length is {CONTEXT} tokens" in error["message"]
