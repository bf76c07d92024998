"""Prompts: texts and conversations, and what is neither."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import make_tokenizer, refused, say
from tiny import tiny_model
from unmask.engine.llm import LanguageModel
from unmask.errors import RequestError

TALK = say("What is 2 + 3?", "The answer is 5.", "Hello")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return LanguageModel(tiny_model("llama", vocab_size=tokenizer.vocab_size), tokenizer, name="tiny")


def test_a_conversation_is_laid_out_by_the_template(model: LanguageModel) -> None:
    assert model.encode_prompt(TALK) == model.encode_chat(TALK)
    assert model.encode_prompt(say("Hello")) == model.encode_prompt("Hello")
    assert model.encode_prompt("Hello", chat=False) != model.encode_prompt("Hello")
    alone = model.generate(TALK, max_new_tokens=6)
    assert alone.ids == model.complete(model.encode_chat(TALK), max_new_tokens=6).ids
    batch = model.generate_batch([TALK, "Hello"], max_new_tokens=6)
    assert [each.ids for each in batch] == [alone.ids, model.generate("Hello", max_new_tokens=6).ids]


@pytest.mark.parametrize(
    ("prompt", "options", "names"),
    [
        (None, {}, ["prompt", None]),
        (5, {}, ["prompt", 5]),
        (b"x", {}, ["prompt", "messages"]),
        (["Hello"], {}, ["prompt", "'Hello'"]),
        ([], {}, ["prompt", 0]),
        ([{"role": "robot", "content": "x"}], {}, ["prompt", "role", "'robot'"]),
        ([{"role": "user"}], {}, ["prompt", "content", "user"]),
        (TALK, {"chat": False}, ["chat", False]),
        ("Hello", {"temperature": "a"}, ["temperature", "'a'", "number"]),
        ("Hello", {"seed": 1.5}, ["seed", 1.5, "whole number"]),
        ("Hello", {"logit_bias": 3}, ["logit_bias", 3]),
        ("Hello", {"logit_bias": {"a": 1.0}}, ["logit_bias", "'a'"]),
        ("Hello", {"logit_bias": {5: float("inf")}}, ["logit_bias", "inf"]),
        ("Hello", {"eos_id": "x"}, ["eos_id", "'x'"]),
    ],
)
def test_what_is_no_prompt_or_option_is_named(
    model: LanguageModel, prompt: Any, options: dict[str, Any], names: list[Any]
) -> None:
    with refused(RequestError, *names):
        model.generate(prompt, **options)
    with refused(RequestError, *names):
        model.generate_batch([prompt], **options)


def test_a_batch_is_no_text(model: LanguageModel) -> None:
    with refused(RequestError, "prompts", "'Hello'"):
        model.generate_batch("Hello")
