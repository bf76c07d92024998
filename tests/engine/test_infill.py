"""Filling holes: what stands around them stays, no special token goes in, the likeliest length wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import SPECIAL_TOKENS, make_sentencepiece_tokenizer, make_tokenizer, refused
from tiny import tiny_model
from unmask.data.tokenizer import Tokenizer
from unmask.engine.infill import MAX_SPAN, best_filling, fill_between, filling_requests, split_holes
from unmask.engine.llm import LanguageModel
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, Costs, Request, TokenLogprob
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import RequestError

TEXT = "The quick ___ fox jumps over the ___ dog."


@pytest.fixture(scope="module", params=[None, "<repo_name>"], ids=["no prefix", "bos"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    specials = (*SPECIAL_TOKENS, "<|mask|>")
    return make_tokenizer(folder, special_tokens=specials, mask_token="<|mask|>", bos_token=request.param)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> LanguageModel:
    shape = {"vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id, "block_size": 8, "eos_ids": (tokenizer.eos_id,)}
    return LanguageModel(tiny_model("llama", 1, torch.float64, **shape), tokenizer, name="tiny")


@pytest.mark.parametrize(
    ("text", "hole", "parts"),
    [
        ("a ___ b", "___", ["a", " b"]),
        ("a___b", "___", ["a", "b"]),
        ("___", "___", ["", ""]),
        ("a ___ ___", "___", ["a", "", ""]),
        ("a  ___ b___", "___", ["a ", " b", ""]),
        ("x [?] y_", "[?]", ["x", " y_"]),
    ],
)
def test_a_space_before_a_hole_goes_into_it(text: str, hole: str, parts: list[str]) -> None:
    assert split_holes(text, hole) == parts


@pytest.mark.parametrize(("text", "hole"), [("nothing to fill", "___"), ("", "___"), ("abc", "")])
def test_a_text_without_a_hole_is_refused(text: str, hole: str) -> None:
    with refused(RequestError, "hole", repr(hole)):
        split_holes(text, hole)


def test_what_stands_around_a_hole_stays(model: LanguageModel, tokenizer: Tokenizer) -> None:
    found = model.infill(TEXT, tokens=3)
    assert (found.tokens_per_hole, len(found.fills)) == (3, 2)
    assert found.text == f"The quick{found.fills[0]} fox jumps over the{found.fills[1]} dog."
    assert not any(special in found.text for special in tokenizer.special_tokens)
    assert found.score < 0.0
    assert found.forwards >= 1
    assert model.infill(TEXT, tokens=3).text == found.text, "calls keep no state"


@pytest.mark.parametrize("padding", ["first", "always", "prepend"])
def test_no_space_is_put_beside_a_hole(tmp_path: Path, padding: str) -> None:
    tokenizer = make_sentencepiece_tokenizer(tmp_path, padding)
    tokenizer.set_mask_token("<|mask|>")
    shape = {"vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id, "block_size": 8, "eos_ids": (tokenizer.eos_id,)}
    model = LanguageModel(tiny_model("llama", 1, **shape), tokenizer, name="tiny")
    for before, after in (("What is f(", ") the"), ("", " is 5."), ("over the", "")):
        found = model.infill(f"{before}___{after}", tokens=2)
        assert found.text == before + found.fills[0] + after
        assert found.text.startswith(before)
        assert found.text.endswith(after)


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_filling_equals_the_oracles(model: LanguageModel, tokenizer: Tokenizer, block_size: int | None) -> None:
    """By default one block over the whole text: the hole sees what comes after it."""
    found = model.infill(TEXT, tokens=2, block_size=block_size, threshold=0.2)
    template = model.request((), max_new_tokens=1, block_size=block_size, threshold=0.2)
    (request,) = filling_requests(template, split_holes(TEXT, "___"), 2, tokenizer, whole=block_size is None)
    assert request.params.block_size == (len(request.ids) if block_size is None else 4)
    assert request.ids.count(None) == 4
    assert request.ids[: len(tokenizer.prefix_ids)] == tuple(tokenizer.prefix_ids)
    assert tokenizer.mask_id is not None
    ids = generate_reference(model.transformer, request, tokenizer.mask_id).ids
    assert found.fills == (tokenizer.decode(ids[:2]), tokenizer.decode(ids[2:]))


def test_of_several_lengths_the_likeliest_is_kept(model: LanguageModel) -> None:
    each = {count: model.infill(TEXT, tokens=count) for count in range(1, 6)}
    found = model.infill(TEXT, tokens=(1, 5))
    best = max(each, key=lambda count: each[count].score)
    assert (found.text, found.tokens_per_hole, found.score) == (each[best].text, best, pytest.approx(each[best].score))
    assert found.forwards == sum(one.forwards for one in each.values())
    assert len({one.text for one in each.values()}) == 5


def test_the_shortest_of_equals_is_kept(tokenizer: Tokenizer) -> None:
    word, other = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    requests = [Request((word, *[None] * count, word), ResolvedParams(max_new_tokens=0)) for count in (1, 2, 3)]

    def completion(count: int, *values: float) -> Completion:
        logprobs = tuple(TokenLogprob(other, value) for value in values)
        costs = Costs(queue_seconds=2.0 + count, prefill_seconds=0.5, denoise_seconds=1.0)
        return Completion((other,) * count, "length", count, logprobs=logprobs, costs=costs)

    equal = [completion(1, -2.0), completion(2, -1.0, -3.0), completion(3, -2.5, -2.0, -1.5)]
    found = best_filling(requests, equal, tokenizer)
    assert (found.tokens_per_hole, found.score, found.forwards, found.seconds) == (1, -2.0, 6, 3.5)
    better = [*equal[:2], completion(3, -1.0, -2.0, -1.5)]
    found = best_filling(requests, better, tokenizer)
    # The prefix is cut from the text, whatever stands there.
    assert (found.tokens_per_hole, found.score, found.fills) == (3, -1.5, ("bbb",))


def test_a_bias_of_the_caller_reaches_the_holes(model: LanguageModel, tokenizer: Tokenizer) -> None:
    favourite = tokenizer.encode("fox")[0]
    found = model.infill("The ___ dog.", tokens=2, logit_bias={favourite: 1e4})
    assert found.fills == (tokenizer.decode([favourite] * 2),)


@pytest.mark.parametrize("tokens", [0, (0, 3), (3, 2), -1])
def test_impossible_lengths_are_refused(model: LanguageModel, tokens: int | tuple[int, int]) -> None:
    least, most = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    with refused(RequestError, "tokens", least, most):
        model.infill(TEXT, tokens=tokens)


def test_an_autoregressive_model_cannot_fill(tokenizer: Tokenizer) -> None:
    model = LanguageModel(tiny_model("llama", 1, vocab_size=tokenizer.vocab_size), tokenizer, name="tiny-ar")
    with refused(RequestError, "autoregressive", "holes"):
        model.infill(TEXT)


@pytest.mark.parametrize("num_before", [10, 600, 5000])
@pytest.mark.parametrize("num_after", [3, 700])
def test_a_hole_between_long_texts_sees_what_fits(
    model: LanguageModel, tokenizer: Tokenizer, num_before: int, num_after: int
) -> None:
    before, after = [5] * (num_before - 1) + [6], [7] * num_after
    request = fill_between(model.request((None,)), before, 20, after, tokenizer, 2048)
    ids, size = request.ids, request.params.block_size
    prefix, hole = len(tokenizer.prefix_ids), ids.index(None)
    assert ids[:prefix] == tokenizer.prefix_ids
    assert ids[hole - 1] == 6
    assert ids[hole : hole + 20] == (None,) * 20
    assert ids[hole + 20 :] == (7,) * min(num_after, MAX_SPAN * 3 // 4 - 20)
    assert len(ids) % size == 0
    assert hole // size == (len(ids) - 1) // size, "the hole and what follows it are in one block"
    assert size <= MAX_SPAN
    assert len(ids) <= 2048
    assert request.params.steps == size, "as many commits a step as in blocks of the usual size"


def test_a_hole_that_leaves_no_room_is_refused(model: LanguageModel, tokenizer: Tokenizer) -> None:
    with refused(RequestError, "max_tokens", 300, 256):
        fill_between(model.request((None,)), [5], 300, [7], tokenizer, 2048)


def test_stop_strings_are_refused(model: LanguageModel) -> None:
    """A hole that ended before one would not be filled."""
    (fill, _) = model.infill(TEXT, tokens=3).fills
    with refused(RequestError, "stop", repr(fill[-1])):
        model.infill(TEXT, tokens=3, stop=fill[-1])
