"""What ends a completion: stop tokens, control tokens as stop strings, and the end of text unless it is ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import SPECIAL_TOKENS, make_tokenizer, refused
from tiny import tiny_model
from unmask.data.tokenizer import Tokenizer
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import RequestError

KINDS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "diffusion": {"mask_id": 5, "block_size": 4},
    "speculative": {"mask_id": 5, "block_size": 4, "start_id": 1},
}
PROMPT = (70, 17, 93, 40, 88)
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(folder, special_tokens=(*SPECIAL_TOKENS, "<|mask|>"), mask_token="<|mask|>")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> LanguageModel:
    transformer = tiny_model("llama", 1, torch.float64, vocab_size=tokenizer.vocab_size, eos_ids=(0,), **KINDS[request.param])
    return LanguageModel(transformer, tokenizer, name=request.param)


def options_of(model: LanguageModel, **options: Any) -> dict[str, Any]:
    """Decoding options that give letters only."""
    assert model.tokenizer is not None
    others = [token for token in range(model.config.vocab_size) if not model.tokenizer.decode([token]).isalpha()]
    return {"max_new_tokens": LENGTH, "threshold": 0.3, "logit_bias": dict.fromkeys(others, float("-inf")), **options}


def test_a_stop_token_ends_as_the_end_of_text_does_and_is_no_text(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    options = options_of(model)
    ids = model.complete(PROMPT, **options).ids
    for token in ids[3], ids[9]:
        first = ids.index(token)
        found = model.complete(PROMPT, stop_token_ids=(token,), **options, logprobs=0)
        assert (found.ids, found.finish_reason, found.end_token) == (ids[: first + 1], "stop", token)
        assert found.text == model.tokenizer.decode(ids[:first])
        assert found.logprobs is not None
        assert len(found.logprobs) == first + 1
        watched = model.complete(PROMPT, stop_token_ids=(token,), stop=("\0",), **options)
        assert watched.text == model.tokenizer.decode(ids[:first])
        assert model.complete(PROMPT, eos_id=token, **options).forwards == found.forwards


def test_a_stop_string_before_a_stop_token_cuts_there(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    ids = model.complete(PROMPT, **options_of(model)).ids
    spelling, later = model.tokenizer.decode(ids[2:3]), next(token for token in ids if token not in ids[:3])
    found = model.complete(PROMPT, **options_of(model, stop_token_ids=(later,), stop=(spelling,)))
    assert len(found.ids) <= 3
    assert (found.stop, found.end_token) == (spelling, None)


def test_a_control_token_as_a_stop_string_ends_at_that_token(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    end = model.tokenizer.special_tokens["<|im_end|>"]
    bias = dict.fromkeys(model.tokenizer.special_tokens.values(), -1000000000.0) | {end: 100.0}
    options: dict[str, Any] = {
        "max_new_tokens": LENGTH,
        "logit_bias": bias,
        "eos_id": model.tokenizer.special_tokens["<|mask|>"],
    }
    assert model.complete(PROMPT, **options).ids == (end,) * LENGTH
    for least in (0, 3):
        found = model.complete(PROMPT, stop=("nothing of it", "<|im_end|>"), min_new_tokens=least, **options)
        assert (found.finish_reason, found.stop, found.end_token) == ("stop", "<|im_end|>", end)
        assert found.ids.index(end) == least == len(found.ids) - 1
        assert found.text == model.tokenizer.decode(found.ids)


def test_an_ignored_end_of_text_is_an_ordinary_token(model: LanguageModel) -> None:
    ids = model.complete(PROMPT, **options_of(model)).ids
    end, stop = ids[4], next(token for token in ids[::-1] if token != ids[4])
    options = options_of(model, eos_id=end, ignore_eos=True)
    found = model.complete(PROMPT, **options)
    assert (found.ids, found.finish_reason) == (ids, "length")
    assert model.complete(PROMPT, **options, min_new_tokens=8).ids == ids, "and nothing bans it"
    stopped = model.complete(PROMPT, **options, stop_token_ids=[stop])
    assert (stopped.ids, stopped.finish_reason) == (ids[: ids.index(stop) + 1], "stop")


def test_a_grammar_ends_whether_the_end_of_text_is_ignored_or_not(model: LanguageModel) -> None:
    ends = [model.complete(PROMPT, regex="[ab]{2,5}", max_new_tokens=LENGTH, ignore_eos=ignored) for ignored in (False, True)]
    assert ends[0] == ends[1]
    assert ends[0].finish_reason == "stop"


def test_holes_are_filled_with_no_end_and_no_stop_token(tokenizer: Tokenizer) -> None:
    transformer = tiny_model("llama", 1, torch.float64, vocab_size=tokenizer.vocab_size, **KINDS["diffusion"])
    model = LanguageModel(transformer, tokenizer, name="diffusion")
    ids = (*PROMPT, None, None, None, 60, 61)
    first, second = model.generate_ids(ids, max_new_tokens=0)[:2]
    filled = model.generate_ids(ids, max_new_tokens=0, eos_id=first, ignore_eos=True, stop_token_ids=(second,))
    assert len(filled) == 3
    assert not {first, second}.intersection(filled)


def test_a_stop_token_outside_the_vocabulary_is_refused() -> None:
    config = tiny_model("llama", 1).config
    with refused(RequestError, "stop_token_ids", config.vocab_size):
        Request((1,), ResolvedParams(stop_token_ids=(config.vocab_size,))).check(config)


def test_penalties_under_a_grammar_are_the_same_with_drafts(tokenizer: Tokenizer) -> None:
    autoregressive, speculative = (
        LanguageModel(
            tiny_model("llama", 1, torch.float64, vocab_size=tokenizer.vocab_size, eos_ids=(0,), **KINDS[kind]),
            tokenizer,
            name=kind,
        )
        for kind in ("autoregressive", "speculative")
    )
    texts = []
    for penalties in {}, {"frequency_penalty": 2.0, "no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 1}:
        options: dict[str, Any] = {"max_new_tokens": LENGTH, "eos_id": 0, "regex": "[ab]{12}", **penalties}
        expected = autoregressive.complete((1, *PROMPT), **options)
        assert speculative.complete(PROMPT, threshold=0.0, **options).ids == expected.ids
        assert set(expected.text) <= {"a", "b"}, "where all is banned, the grammar goes on"
        texts.append(expected.ids)
    assert len(set(texts)) > 1
