"""Decoding options: what is valid, what a model fills in, and how values are read from text."""

from __future__ import annotations

import math
from typing import Any

import pytest

import unmask
from helpers import refused
from tiny import tiny_config
from unmask.engine.sampling_params import (
    BLOCK_SIZE,
    PRESETS,
    SPECULATIVE_THRESHOLD,
    THRESHOLD,
    Option,
    ResolvedParams,
    SamplingParams,
)
from unmask.errors import RequestError

OPTIONS = SamplingParams.options()
PLAIN = tiny_config("llama")


@pytest.mark.parametrize(
    ("arguments", "value", "rule"),
    [
        ({"block_size": 0}, "0", "at least 1"),
        ({"steps": 0}, "0", "at least 1"),
        ({"threshold": 1.01}, "1.01", "[0, 1]"),
        ({"threshold": -0.1}, "-0.1", "[0, 1]"),
        ({"threshold": math.nan}, "nan", "[0, 1]"),
        ({"temperature": -1.0}, "-1.0", "finite and at least 0"),
        ({"temperature": math.inf}, "inf", "finite and at least 0"),
        ({"temperature": math.nan}, "nan", "finite and at least 0"),
        ({"temperature": 10**400}, "inf", "finite and at least 0"),
        ({"top_k": 0}, "0", "at least 1"),
        ({"top_k": "5"}, "'5'", "a whole number"),
        ({"top_p": 0.0}, "0.0", "(0, 1]"),
        ({"top_p": 1.5}, "1.5", "(0, 1]"),
        ({"top_p": math.nan}, "nan", "(0, 1]"),
        ({"window": 0, "edit_threshold": 0.5}, "0", "at least 1"),
        ({"window": 2}, "2", "edit_threshold"),
        ({"window": None}, "None", "a whole number"),
        ({"edit_threshold": 1.5}, "1.5", "[0, 1]"),
        ({"edit_threshold": -0.1}, "-0.1", "[0, 1]"),
        ({"policy": "greedy"}, "'greedy'", "threshold, entropy, fixed"),
        ({"preset": "fast"}, "'fast'", "speed, quality"),
        ({"entropy_bound": -0.5}, "-0.5", "at least 0"),
        ({"entropy_bound": math.nan}, "nan", "at least 0"),
        ({"max_post_steps": -1}, "-1", "at least 0"),
        ({"max_new_tokens": -1}, "-1", "at least 0"),
        ({"min_new_tokens": -1}, "-1", "at least 0"),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, "4", "at most max_new_tokens, 3"),
        ({"min_p": 1.5}, "1.5", "[0, 1]"),
        ({"min_p": -0.1}, "-0.1", "[0, 1]"),
        ({"frequency_penalty": 2.5}, "2.5", "[-2, 2]"),
        ({"presence_penalty": -3}, "-3", "[-2, 2]"),
        ({"presence_penalty": None}, "None", "a number"),
        ({"repetition_penalty": 0}, "0", "[0.01, 100]"),
        ({"repetition_penalty": math.nan}, "nan", "[0.01, 100]"),
        ({"no_repeat_ngram_size": -1}, "-1", "at least 0"),
        ({"stop_token_ids": (5, -1)}, "-1", "at least 0"),
        ({"stop_token_ids": (2.0,)}, "2.0", "whole numbers"),
        ({"stop_token_ids": 1.5}, "1.5", "whole numbers"),
        ({"stop": ("a", 5)}, "5", "texts"),
        ({"ignore_eos": 1}, "1", "yes or no"),
        ({"logprobs": 21}, "21", "[0, 20]"),
        ({"logprobs": -1}, "-1", "[0, 20]"),
        ({"logprobs": True}, "True", "a whole number"),
        ({"seed": 2**63}, str(2**63), str(2**63 - 1)),
        ({"prompt_lookup": "on"}, "'on'", "yes or no"),
        ({"mode": "causal"}, "'causal'", "ar, speculative, diffusion"),
        ({"grammar": 5}, "5", "text"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(arguments: dict[str, Any], value: str, rule: str) -> None:
    for kind in (SamplingParams, ResolvedParams):
        with refused(RequestError, next(iter(arguments)), value, rule):
            kind(**arguments)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"stop": ("x", "")}, ["stop"]),
        ({"mode": "speculative", "policy": "fixed"}, ["mode speculative", "policy"]),
        ({"mode": "ar", "edit_threshold": 0.5}, ["mode ar", "edit_threshold"]),
        ({"mode": "speculative", "preset": "speed"}, ["mode speculative", "preset"]),
        ({"mode": "ar", "block_size": 8}, ["block_size", "mode ar"]),
        ({"regex": "a", "grammar": "start: A"}, ["regex", "grammar"]),
        ({"regex": "a", "json_schema": True}, ["json_schema", "regex"]),
        ({"regex": "a", "edit_threshold": 0.5}, ["regex", "edit_threshold"]),
        ({"json_schema": False, "preset": "quality"}, ["json_schema", "preset"]),
    ],
)
def test_options_that_exclude_each_other_are_refused(arguments: dict[str, Any], names: list[str]) -> None:
    with refused(RequestError, *names):
        SamplingParams(**arguments)


def test_the_bounds_themselves_are_valid() -> None:
    SamplingParams(block_size=1, threshold=0.0, steps=1, temperature=0.0, top_k=1, top_p=1.0, logprobs=20, seed=-(2**63))
    SamplingParams(threshold=1.0, logprobs=0, seed=2**63 - 1, max_new_tokens=0, min_new_tokens=0, edit_threshold=0.0)


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with refused(RequestError, "heat", *SamplingParams.options()):
        SamplingParams().replace(heat=1)


def test_it_is_public() -> None:
    assert unmask.SamplingParams is SamplingParams
    assert set(unmask.__all__) <= set(dir(unmask))


def test_stop_strings_may_be_one_or_many() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert SamplingParams().replace(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=5).stop_token_ids == (5,)  # type: ignore[arg-type]
    assert SamplingParams().replace(stop_token_ids=[7, 5]).stop_token_ids == (7, 5)


def test_only_what_differs_from_the_defaults_is_given() -> None:
    assert SamplingParams().given() == {}
    assert SamplingParams(temperature=0.0, window=1, edit_threshold=0.0).given() == {"temperature": 0.0, "edit_threshold": 0.0}


def test_what_is_left_open_comes_from_the_model() -> None:
    assert SamplingParams().resolve(PLAIN) == ResolvedParams(block_size=PLAIN.block_size or BLOCK_SIZE, mode="speculative")
    resolved = SamplingParams(temperature=0.5, threshold=0.3, block_size=8).resolve(
        tiny_config("llama", mask_id=5, block_size=4)
    )
    assert (resolved.block_size, resolved.steps, resolved.threshold, resolved.temperature) == (8, 8, 0.3, 0.5)
    assert SamplingParams(steps=3).resolve(tiny_config("llama", mask_id=5, block_size=4)) == ResolvedParams(
        block_size=4, steps=3
    )


def test_speculative_is_the_default_where_it_is_possible() -> None:
    shifted = tiny_config("llama", mask_id=5, block_size=4, start_id=4)
    assert SamplingParams().resolve(shifted).mode == "speculative"
    assert SamplingParams().resolve(shifted).threshold == SPECULATIVE_THRESHOLD
    assert SamplingParams(threshold=0.9).resolve(shifted).threshold == 0.9
    others = [SamplingParams(policy="fixed"), SamplingParams(edit_threshold=0.5), SamplingParams(mode="diffusion")]
    for params in others:
        assert (params.resolve(shifted).mode, params.resolve(shifted).threshold) == ("diffusion", THRESHOLD)
    assert SamplingParams(preset="speed").resolve(shifted).mode == "diffusion"
    assert SamplingParams().resolve(shifted, has_holes=True).mode == "diffusion"
    assert SamplingParams().resolve(PLAIN).mode == "speculative", "by prompt lookup"
    ar = SamplingParams(mode="ar").resolve(shifted)
    assert (ar.block_size, ar.steps, ar.prompt_lookup) == (1, 1, False)


def test_the_presets_are_the_published_ones_and_options_override_them() -> None:
    settings = {name: (p["threshold"], p["edit_threshold"], p["max_post_steps"]) for name, p in PRESETS.items()}
    assert settings == {"speed": (0.5, 0.0, 16), "quality": (0.7, 0.5, 16)}
    for name in OPTIONS["preset"].choices:
        resolved = SamplingParams(preset=name).resolve(PLAIN)  # type: ignore[arg-type]
        assert (resolved.threshold, resolved.edit_threshold, resolved.max_post_steps) == settings[name]
        assert resolved.editing
    assert SamplingParams(preset="speed", threshold=0.9).resolve(PLAIN).threshold == 0.9


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("top_k", "5", 5),
        ("threshold", "0.5", 0.5),
        ("prompt_lookup", "no", False),
        ("prompt_lookup", "ON", True),
        ("seed", "-1", -1),
    ],
)
def test_a_value_is_read_by_its_type(name: str, text: str, value: Any) -> None:
    assert OPTIONS[name].parse(text) == value


@pytest.mark.parametrize(("name", "text"), [("top_k", "5.5"), ("threshold", "high"), ("prompt_lookup", "perhaps")])
def test_a_text_of_another_type_is_refused_by_name(name: str, text: str) -> None:
    with refused(RequestError, name, repr(text)):
        OPTIONS[name].parse(text)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=list(OPTIONS))
def test_every_option_is_declared_in_full(option: Option) -> None:
    assert option.help.endswith(".")
    assert option.shown_default
    if option.kind in (int, float):
        assert option.minimum is not None
        assert option.range
