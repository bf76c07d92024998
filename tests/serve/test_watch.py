"""The provisional view: extra events beside an ordinary stream, in which nothing committed ever changes."""

from __future__ import annotations

from typing import Any

import pytest
from asking import HELLO, ask, joined, texts
from live import Live
from openai import BadRequestError, OpenAI

MOST = 24
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"temperature": 1.5, "seed": 3, "n": 3},
    "edits": {"temperature": 1.5, "seed": 3, "n": 2, "diffusion": {"edit_threshold": 0.1, "min_new_tokens": 20}},
    "window": {"temperature": 1.5, "seed": 4, "diffusion": {"edit_threshold": 0.1, "window": 2, "min_new_tokens": 20}},
    "ends": {"temperature": 1.5, "seed": 4, "n": 2, "logit_bias": {"0": 5.0}},
    "stop": {"temperature": 1.5, "seed": 3, "n": 2, "stop": ["sys", "e"]},
    "schema": {"response_format": {"type": "json_object"}, "temperature": 1.5, "seed": 3},
}


def _watch(client: OpenAI, body: dict[str, Any], *, most: int = MOST) -> list[Any]:
    body = {**body, "diffusion": {**body.get("diffusion", {}), "watch": True}, "stream_options": {"include_usage": True}}
    diffusion = body.pop("diffusion")
    return list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=most,
            stream=True,
            logprobs=True,
            extra_body={"diffusion": diffusion},
            **body,
        )
    )


@pytest.mark.parametrize("name", RULES)
def test_what_is_committed_stays(site: Live, client: OpenAI, name: str) -> None:
    chunks = _watch(client, RULES[name])
    body = {name: value for name, value in RULES[name].items() if name != "diffusion"}
    reply = joined(chunks)
    unwatched = ask(site.url, "plain", max_tokens=MOST, extra_body={"diffusion": RULES[name].get("diffusion", {})}, **body)
    assert texts(reply) == texts(unwatched)
    assert reply.usage == unwatched.usage
    events = [chunk.diffusion for chunk in chunks[:-1] if not chunk.choices]
    assert {event["index"] for event in events} == set(range(len(reply.choices)))
    for index, received in enumerate(reply.choices):
        assert received.logprobs is not None
        spelled = [entry["token"] for entry in received.logprobs]
        _check([event for event in events if event["index"] == index], spelled)


def _check(events: list[dict[str, Any]], spelled: list[str]) -> None:
    """Events of one completion whose tokens are known in the end."""
    committed, forwards, shown = 0, 0, 0
    for event in events:
        assert event["committed"] >= committed
        assert event["forwards"] > forwards
        assert event["start"] <= event["committed"], "everything before the first token is committed"
        assert event["start"] + len(event["tokens"]) <= MOST, "nothing is shown that is not asked for"
        committed, forwards = event["committed"], event["forwards"]
        for place, token in enumerate(event["tokens"], event["start"]):
            state = token["state"]
            assert state in ("masked", "provisional", "committed", "edited")
            assert token["confidence"] is None or 0 <= token["confidence"] <= 1
            if place < committed:
                assert state in ("committed", "edited")
                assert token["text"] == spelled[place]
            else:
                assert state != "committed"
            shown += 1
    assert shown > 0
    assert committed >= len(spelled)


def _states(client: OpenAI, name: str) -> set[str]:
    events = [chunk.diffusion for chunk in _watch(client, RULES[name])[:-1] if not chunk.choices]
    return {token["state"] for event in events for token in event["tokens"]}


def test_edits_are_shown_where_there_are_any(site: Live, client: OpenAI) -> None:
    assert _states(client, "edits") == {"masked", "provisional", "committed", "edited"}
    assert _states(client, "sampled") == {"masked", "provisional", "committed"}


def test_edits_are_counted(site: Live, client: OpenAI) -> None:
    """All of them, where the completion ends with its block: edits behind its end are not shown."""
    prompt = _watch(client, {}, most=1)[-1].usage.prompt_tokens
    length = MOST - (prompt + MOST) % 8  # blocks of the tiny model
    diffusion = {**RULES["edits"]["diffusion"], "min_new_tokens": length}
    for seed in range(6):
        chunks = _watch(client, {**RULES["edits"], "n": 1, "seed": seed, "diffusion": diffusion}, most=length)
        events = [chunk.diffusion for chunk in chunks[:-1] if not chunk.choices]
        seen = sum(token["state"] == "edited" for event in events for token in event["tokens"])
        ends = [chunk.diffusion for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
        forwards = [event["forwards"] for event in events]
        is_merged = any(after > before + 1 for before, after in zip([0, *forwards], forwards, strict=False))
        (edits,) = [end["edits"] for end in ends]
        assert 0 < seen <= edits
        assert seen == edits or is_merged, (
            "steps are merged where the reader is slow; then the last state of each token is shown"
        )


def test_text_is_handed_out_in_the_step_that_commits_it(client: OpenAI) -> None:
    """Within a block the contiguous prefix is out at once; only half characters wait."""
    text, lengths = "", []
    for chunk in _watch(client, RULES["plain"])[:-1]:
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        if not chunk.choices:
            committed = [token["text"] for token in chunk.diffusion["tokens"] if token["state"] == "committed"]
            assert text.rstrip("\ufffd").endswith("".join(committed).rstrip("\ufffd")[-3:])
            lengths.append(len(text))
    assert len(set(lengths)) > 4, "it came in parts"


def test_completions_can_be_watched_too(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=["The quick", "Hello"],
            max_tokens=12,
            stream=True,
            extra_body={"diffusion": {"watch": True}},
        )
    )
    events = [chunk.diffusion for chunk in chunks if not chunk.choices]
    assert {event["index"] for event in events} == {0, 1}
    assert all(event["tokens"] for event in events)


def test_watching_needs_a_stream(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="stream") as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"diffusion": {"watch": True}})
    assert caught.value.param == "diffusion.watch"
