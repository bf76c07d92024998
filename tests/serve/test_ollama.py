"""Ollama's API through its official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from asking import HELLO, HTTP, chat_ids
from live import Live

from helpers import assert_names
from unmask.engine.llm import LanguageModel
from unmask.serve.protocol.ollama import OllamaChatRequest

ollama = pytest.importorskip("ollama")
SAMPLED = {"temperature": 1.5, "seed": 11}


@pytest.fixture(scope="module")
def client(site: Live) -> Iterator[Any]:
    with ollama.Client(host=site.url, verify=False) as made:
        yield made


def joined(parts: Any, read: Any) -> tuple[str, Any]:
    """The text of a stream, and its last part."""
    *parts, last = list(parts)
    assert not any(part.done for part in parts)
    assert last.done
    return "".join(read(part) or "" for part in [*parts, last]), last


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {**SAMPLED, "top_k": 5}, {"stop": ["}", "sys"], **SAMPLED}, {"repeat_penalty": 1.0}])
def test_a_chat_is_the_engines(client: Any, tiny: LanguageModel, options: dict[str, Any], stream: bool) -> None:
    got = client.chat(model="tiny", messages=HELLO, options={"num_predict": 20, **options}, stream=stream)
    text, last = joined(got, lambda part: part.message.content) if stream else (got.message.content, got)
    wanted = {name: value for name, value in options.items() if name != "repeat_penalty"}
    target = tiny.complete(chat_ids(tiny), max_new_tokens=20, **wanted)
    assert tiny.tokenizer is not None
    assert text == (tiny.tokenizer.decode(target.text_ids) if target.text is None else target.text)
    assert last.model == "tiny"
    assert last.done_reason == target.finish_reason
    assert (last.prompt_eval_count, last.eval_count) == (len(chat_ids(tiny)), len(target.ids))
    assert min(last.total_duration, last.load_duration, last.prompt_eval_duration, last.eval_duration) > 0


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_answered_continued_and_filled_in(site: Live, client: Any, tiny: LanguageModel, stream: bool) -> None:
    def generate(**body: Any) -> str:
        got = client.generate(model="tiny:latest", options={"num_predict": 8}, stream=stream, **body)
        return joined(got, lambda part: part.response)[0] if stream else got.response

    assert tiny.tokenizer is not None
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    answer = tiny.generate_ids(chat_ids(tiny, system), max_new_tokens=8)
    assert generate(prompt=HELLO[0]["content"], system="Be brief.") == tiny.tokenizer.decode(answer)
    plain = tiny.generate_ids(tiny.encode_prompt("The quick", chat=False), max_new_tokens=8)
    assert generate(prompt="The quick", raw=True) == tiny.tokenizer.decode(plain)
    body = {"model": "tiny", "prompt": "a", "suffix": "b", "max_tokens": 8}
    filled = HTTP.post(f"{site.url}/v1/completions", json=body)
    assert generate(prompt="a", suffix="b") == filled.json()["choices"][0]["text"]


def test_answers_follow_a_format(client: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    got = client.chat(model="tiny", messages=HELLO, format=schema, options={"num_predict": 40})
    assert json.loads(got.message.content)["n"] in (1, 2)
    assert json.loads(client.generate(model="tiny", prompt="Hi", format=schema).response)["n"] in (1, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: Any, tiny: LanguageModel, stream: bool) -> None:
    options = {"num_predict": 6}
    got = client.chat(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, options=options, stream=stream)
    entries = [entry for part in (got if stream else [got]) for entry in part.logprobs or []]
    target = tiny.complete(chat_ids(tiny), max_new_tokens=6, logprobs=2).logprobs
    assert target is not None
    assert [entry.logprob for entry in entries] == [entry.logprob for entry in target]
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_the_model_is_listed_and_described(client: Any, tiny: LanguageModel) -> None:
    (listed,), (running,) = client.list().models, client.ps().models
    assert listed.model == running.model == "tiny:latest"
    assert running.context_length == tiny.config.max_positions
    shown = client.show("tiny")
    assert shown.modelinfo["llama.context_length"] == tiny.config.max_positions
    assert shown.modelinfo["general.parameter_count"] == tiny.transformer.num_parameters()
    assert "completion" in shown.capabilities


def test_a_model_is_loaded_and_unloaded_without_a_word(client: Any) -> None:
    assert client.generate(model="tiny").done_reason == "load"
    assert client.chat(model="tiny", messages=[], keep_alive=0).done_reason == "unload"


@pytest.mark.parametrize(
    ("call", "status", "names"),
    [
        (lambda c: c.chat(model="other", messages=HELLO), 404, ["other", "tiny"]),
        (lambda c: c.chat(model="tiny", messages=HELLO, think=True), 400, ["think"]),
        (lambda c: c.generate(model="tiny", prompt="a", template="{{ .Prompt }}"), 400, ["template"]),
        (lambda c: c.generate(model="tiny", prompt="a", images=[b"x"]), 400, ["images"]),
        (lambda c: c.generate(model="tiny", prompt="a" * 3000), 400, ["256"]),
        (lambda c: list(c.chat(model="tiny", messages=HELLO, options={"temperature": -1}, stream=True)), 400, ["temperature"]),
        (lambda c: c.embed(model="tiny", input="a"), 400, ["embeddings"]),
        (lambda c: c.show("other"), 404, ["other"]),
        (lambda c: c.delete("tiny"), 404, ["/api/delete"]),
    ],
)
def test_errors_are_ollamas(client: Any, call: Any, status: int, names: list[str]) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        call(client)
    assert caught.value.status_code == status
    assert_names(caught.value.error, *names)


def test_streams_and_unknown_options_over_the_wire(site: Live) -> None:
    body = {"model": "tiny", "messages": HELLO, "options": {"num_predict": 4, "mirostat": 2, "num_ctx": 9}}
    got = HTTP.post(f"{site.url}/api/chat", json=body)
    assert got.headers["content-type"] == "application/x-ndjson"
    assert got.headers["x-unmask-ignored-fields"] == "options.mirostat"
    assert json.loads(got.text.splitlines()[-1])["done"]
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        untyped = HTTP.post(f"{site.url}/api/chat", content=json.dumps(body | {"stream": False}), headers=headers)
        assert untyped.json()["done"], "as litellm and curl send it"
    assert HTTP.head(site.url).status_code == 200
    assert HTTP.get(f"{site.url}/api/version").json()["version"]


def test_calls_of_a_conversation_find_their_answers() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"city": "Ä"}}}

    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call("rain"), call("sun")]},
        {"role": "tool", "tool_name": "sun", "content": "9 h"},
        {"role": "tool", "content": "2 mm"},
    ]
    body = OllamaChatRequest.model_validate({"model": "m", "messages": messages, "tools": [{"function": {"name": "rain"}}]})
    _, asked, sun, rain = body.to_chat("m").messages
    assert asked.tool_calls is not None
    assert [each.function.arguments for each in asked.tool_calls] == ['{"city": "Ä"}'] * 2
    assert [sun.tool_call_id, rain.tool_call_id] == [asked.tool_calls[1].id, asked.tool_calls[0].id]
