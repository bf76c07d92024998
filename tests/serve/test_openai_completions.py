"""Completions, infilling, tokens and models through the official client."""

from __future__ import annotations

import asyncio
import itertools
from codecs import getincrementaldecoder
from typing import Any

import pytest
from asking import HELLO, HTTP, TWO_WAYS, WAYS, ask, chat_ids, connect_async, expected, texts
from live import CONTEXT, Live
from openai import BadRequestError, NotFoundError, OpenAI

from helpers import refused
from unmask.engine.infill import fill_between
from unmask.engine.llm import LanguageModel
from unmask.engine.request import distinct_samples
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import RequestError

PROMPT = "The quick brown fox"
SAMPLED = {"temperature": 1.5, "seed": 11}


def _ids(model: LanguageModel, text: str) -> list[int]:
    return model.encode_prompt(text, chat=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"n": 3, "best_of": 3, **SAMPLED}, {"n": 3, **SAMPLED}),
        ({"stop": ["}", "sys"], **SAMPLED}, {"stop": ("}", "sys"), **SAMPLED}),
        ({"logit_bias": {"0": 5}, **SAMPLED}, {"logit_bias": {0: 5.0}, **SAMPLED}),
        (
            {"extra_body": {"diffusion": {"threshold": 0.5}}, "top_p": 0.5, **SAMPLED},
            {"threshold": 0.5, "top_p": 0.5, **SAMPLED},
        ),
    ],
    ids=["greedy", "several", "stop", "ends", "rules"],
)
def test_a_completion_is_the_engines(
    site: Live, tiny: LanguageModel, fields: dict[str, Any], options: dict[str, Any], way: str
) -> None:
    got = ask(site.url, way, endpoint="completions", prompt=PROMPT, max_tokens=20, **fields)
    target = expected(tiny, _ids(tiny, PROMPT), max_new_tokens=20, **options)
    assert texts(got) == texts(target)
    assert got.usage == target.usage


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts(site: Live, tiny: LanguageModel, as_ids: bool, way: str) -> None:
    given = [PROMPT, "State the", "12 + 34 ="]
    prompt: Any = [_ids(tiny, text) for text in given] if as_ids else given
    got = ask(site.url, way, endpoint="completions", prompt=prompt, n=2, max_tokens=8, echo=True, **SAMPLED)
    target = [expected(tiny, _ids(tiny, text), n=2, max_new_tokens=8, **SAMPLED) for text in given]
    assert texts(got) == [
        (text + received.text, received.finish_reason)
        for text, reply in zip(given, target, strict=True)
        for received in reply.choices
    ]
    assert got.usage == (sum(reply.usage[0] for reply in target), sum(reply.usage[1] for reply in target))


def test_one_prompt_of_ids_and_the_usual_limit(site: Live, tiny: LanguageModel) -> None:
    ids = _ids(tiny, PROMPT)
    got = ask(site.url, "plain", endpoint="completions", prompt=ids)
    assert texts(got) == texts(expected(tiny, ids, max_new_tokens=16))
    assert got.usage == (len(ids), 16)


@pytest.mark.parametrize("seed", [{}, {"seed": 11}], ids=["no seed", "seed"])
def test_equal_prompts_of_one_request_are_answered_differently(site: Live, seed: dict[str, int]) -> None:
    """With a seed the list is answered alike every time, and its first answer is that to the prompt alone."""
    fields = {"endpoint": "completions", "max_tokens": 16, "temperature": 1.5, **seed}
    answers = [choice.text for choice in ask(site.url, "plain", prompt=[PROMPT, PROMPT, PROMPT], n=2, **fields).choices]
    assert len(set(answers)) == 6
    if seed:
        again = ask(site.url, "plain", prompt=[PROMPT, "State the", PROMPT], n=2, **fields).choices
        assert [choice.text for choice in again][:2] + [choice.text for choice in again][4:] == answers[:4]


@pytest.mark.parametrize("way", TWO_WAYS)
def test_logprobs(site: Live, tiny: LanguageModel, way: str) -> None:
    got = ask(site.url, way, endpoint="completions", prompt=PROMPT, max_tokens=12, logprobs=2, n=2, **SAMPLED)
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    request = tiny.request(_ids(tiny, PROMPT), max_new_tokens=12, logprobs=2, **SAMPLED)
    for received, sample in zip(got.choices, distinct_samples([request] * 2), strict=True):
        entries = tiny.engine(prefix_cache=False).run([sample])[0].logprobs
        assert received.logprobs is not None
        assert entries is not None
        (choice_logprobs,) = received.logprobs
        assert choice_logprobs["token_logprobs"] == [entry.logprob for entry in entries]
        shown = [tokenizer.decode([entry.token]) for entry in entries]
        assert [_shown(name) for name in choice_logprobs["tokens"]] == shown
        decode = getincrementaldecoder("utf-8")("replace").decode
        lengths = [len(decode(tiny.grammars.token_bytes[entry.token])) for entry in entries]
        assert choice_logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(entries))]
        for alternatives, entry in zip(choice_logprobs["top_logprobs"], entries, strict=True):
            assert len(alternatives) == 2, "parts of characters are told apart by their bytes"
            target = [(tokenizer.decode([token]), logprob) for token, logprob in entry.alternatives]
            assert [(_shown(name), logprob) for name, logprob in alternatives.items()] == target


def _shown(name: str) -> str:
    """The text of a token's name: part of a character goes by its bytes."""
    spelled = name.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
    return spelled.decode(errors="replace") if name.startswith("bytes:") else name


@pytest.mark.parametrize("way", TWO_WAYS)
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_a_prompt_is_scored(site: Live, tiny: LanguageModel, max_tokens: int, way: str) -> None:
    """As lm-eval asks: prompts of ids, `echo` with `logprobs`, one token."""
    prompts = [_ids(tiny, PROMPT), _ids(tiny, "State the capital")]
    got = ask(site.url, way, endpoint="completions", prompt=prompts, max_tokens=max_tokens, echo=True, logprobs=2)
    assert tiny.tokenizer is not None
    for ids, received in zip(prompts, got.choices, strict=True):
        (target,) = tiny.engine().run([tiny.request(ids, max_new_tokens=max_tokens, prompt_logprobs=2, logprobs=2)])
        scores = [*(target.prompt_logprobs or ()), *(target.logprobs or ())]
        assert received.logprobs is not None
        (lists,) = received.logprobs
        assert lists["token_logprobs"] == [None if score is None else score.logprob for score in scores]
        assert lists["top_logprobs"][0] is None
        assert all(len(alternatives) == 2 for alternatives in lists["top_logprobs"][1:])
        assert lists["text_offset"][:3] == [0, *itertools.accumulate(len(tiny.tokenizer.decode([token])) for token in ids[:2])]
        assert received.text == tiny.tokenizer.decode([*ids, *target.ids])
        assert received.finish_reason == "length"
    assert got.usage == (sum(map(len, prompts)), 2 * max_tokens)


def test_the_end_of_the_text_is_listed_after_a_scored_prompt(client: OpenAI, tiny: LanguageModel) -> None:
    """lm-eval leaves out the last entry, which is the one token that it has to ask for."""
    ids, (eos,) = _ids(tiny, PROMPT), tiny.config.eos_ids
    got = client.completions.create(
        model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=1, logit_bias={str(eos): 100}
    ).choices[0]
    assert got.finish_reason == "stop"
    assert got.text == PROMPT
    assert got.logprobs is not None
    assert len(got.logprobs.token_logprobs or ()) == len(ids) + 1


@pytest.mark.parametrize("way", TWO_WAYS)
def test_the_text_before_a_suffix(site: Live, tiny: LanguageModel, way: str) -> None:
    got = ask(site.url, way, endpoint="completions", prompt="def f(", suffix="):\n    return 1", max_tokens=6, n=2, **SAMPLED)
    assert tiny.tokenizer is not None
    before, after = tiny.tokenizer.encode("def f("), tiny.tokenizer.encode("):\n    return 1")
    template = tiny.request((None,), **SAMPLED)
    request = fill_between(template, before, 6, after, tiny.tokenizer, CONTEXT)
    assert request.params.block_size == len(request.ids), "the hole sees what follows it"
    done = tiny.engine().run(distinct_samples([request, request]))
    assert [received.text for received in got.choices] == [tiny.tokenizer.decode(each.ids) for each in done]
    assert {len(each.ids) for each in done} == {6}
    assert got.usage == (len(before) + len(after), 12)


def test_the_stream_of_several_ends_each_once(client: OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=5, stream=True))
    reasons = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason is not None]
    assert sorted(reasons) == [0, 1, 2, 3]
    assert all("usage" not in chunk.to_dict() for chunk in chunks)


def test_infilling(site: Live, tiny: LanguageModel, client: OpenAI) -> None:
    body = {"model": "tiny", "text": "The [] fox jumps [] dog.", "hole": "[]", "tokens": [2, 4], "seed": 3, "temperature": 1.0}
    got: Any = client.post("/infill", body=body, cast_to=object)
    target = tiny.infill(body["text"], hole="[]", tokens=(2, 4), seed=3, temperature=1.0)
    assert (got["text"], tuple(got["fills"])) == (target.text, target.fills)
    assert (got["score"], got["tokens_per_hole"]) == (pytest.approx(target.score), target.tokens_per_hole)
    around = sum(len(tiny.tokenizer.encode(part)) for part in ("The", " fox jumps", " dog."))
    assert (got["usage"]["prompt_tokens"], got["usage"]["completion_tokens"]) == (around, 2 * (2 + 3 + 4))
    left, right = got["fills"]
    assert got["text"] == f"The{left} fox jumps{right} dog."


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"text": "no hole"}, "text"),
        ({"text": "x" * 2 * CONTEXT + "___"}, "text"),
        ({"tokens": [3, 2]}, "tokens"),
        ({"tokens": 0}, "tokens"),
        ({"hole": ""}, "hole"),
        ({"diffusion": {"window": 2}}, "diffusion.window"),
        ({"n": 2}, "n"),
    ],
)
def test_infilling_says_what_is_wrong(client: OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.post("/infill", body={"model": "tiny", "text": "a ___ b", **changes}, cast_to=object)
    assert caught.value.param == param


def test_a_shifted_model_neither_fills_nor_edits(tmp_path: Any) -> None:
    from live import live, served_model

    model = served_model(tmp_path, shifted=True)
    with live(model) as site:
        body = {"model": "tiny", "text": "a ___ b", "tokens": [1, 3]}
        answer = HTTP.post(f"{site.url}/v1/infill", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "text")
        edited = {"model": "tiny", "prompt": "a", "diffusion": {"preset": "speed"}}
        answer = HTTP.post(f"{site.url}/v1/completions", json=edited)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "diffusion.edit_threshold")
        (listed,) = HTTP.get(f"{site.url}/v1/models").json()["data"]
    assert listed["capabilities"] == {"diffusion": True, "speculative": True, "infill": False, "editing": False}
    names = {option["name"] for option in listed["options"]}
    assert "mode" in names
    assert names.isdisjoint(("preset", "edit_threshold", "max_post_steps", "window"))
    with refused(RequestError, "holes", "smollm2-135m-converted"):
        model.infill("a ___ b")


def test_an_autoregressive_model_fills_nothing(tmp_path: Any) -> None:
    from live import live, served_model

    with live(served_model(tmp_path, diffusion=False)) as site:
        answer = HTTP.post(f"{site.url}/v1/infill", json={"model": "tiny", "text": "a ___ b"})
        assert answer.status_code == 400
        assert "autoregressive" in answer.json()["error"]["message"]
        assert HTTP.get(f"{site.url}/v1/models").json()["data"][0]["diffusion"] is None


def test_tokenizing(tiny: LanguageModel, client: OpenAI) -> None:
    text = "Hello <|im_end|> é🎉"
    got: Any = client.post("/tokenize", body={"prompt": text}, cast_to=object)
    assert got == {"tokens": tiny.tokenizer.encode(text), "count": len(got["tokens"]), "max_model_len": CONTEXT}
    got = client.post("/tokenize", body={"model": "tiny", "messages": HELLO}, cast_to=object)
    assert got["tokens"] == chat_ids(tiny)
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).usage.prompt_tokens == got["count"]
    with pytest.raises(NotFoundError):
        client.post("/tokenize", body={"model": "other", "prompt": text}, cast_to=object)
    for body in ({}, {"prompt": "a", "messages": HELLO}):
        with pytest.raises(BadRequestError) as caught:
            client.post("/tokenize", body=body, cast_to=object)
        assert caught.value.param == "prompt"


def test_models(site: Live, client: OpenAI) -> None:
    (listed,) = client.models.list()
    retrieved = client.models.retrieve("tiny")
    assert listed == retrieved
    assert (retrieved.id, retrieved.object, retrieved.owned_by) == ("tiny", "model", "unmask")
    assert retrieved.model_extra is not None
    options = {option["name"]: option for option in retrieved.model_extra.pop("options")}
    capabilities = {"diffusion": True, "speculative": False, "infill": True, "editing": True}
    diffusion = {"block_size": 8, "threshold": 0.95}
    rest = {"max_model_len": CONTEXT, "capabilities": capabilities, "diffusion": diffusion}
    assert retrieved.model_extra == {"root": "tiny", "parent": None, **rest}
    for name, option in SamplingParams.options().items():
        causal = name in ("mode", "prompt_lookup")
        assert (name in options) == ("page" in option.surfaces and not causal), "no speculation without shift"
    assert (options["threshold"]["default"], options["steps"]["default"], options["seed"]["default"]) == (0.95, 8, None)
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("gpt/other")
    assert caught.value.code == "model_not_found"

    async def names() -> list[str]:
        async with connect_async(site.url) as asynchronous:
            return [model.id async for model in asynchronous.models.list()]

    assert asyncio.run(names()) == ["tiny"]
