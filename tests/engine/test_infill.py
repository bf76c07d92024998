"""Filling holes: what stands around them stays, no special token goes in, the likeliest length wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import SPECIAL_TOKENS, make_tokenizer, refused
from tiny import tiny_model
from unmask.data.tokenizer import Tokenizer
from unmask.engine.infill import best_filling, filling_requests, split_holes
from unmask.engine.llm import LanguageModel
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, Request, TokenLogprob
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
        return Completion((other,) * count, "length", count, logprobs=tuple(TokenLogprob(other, value) for value in values))

    equal = [completion(1, -2.0), completion(2, -1.0, -3.0), completion(3, -2.5, -2.0, -1.5)]
    found = best_filling(requests, equal, tokenizer, 1.5)
    assert (found.tokens_per_hole, found.score, found.forwards, found.seconds) == (1, -2.0, 6, 1.5)
    better = [*equal[:2], completion(3, -1.0, -2.0, -1.5)]
    found = best_filling(requests, better, tokenizer, 1.5)
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
