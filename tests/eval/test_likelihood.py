"""The likelihood estimator against exact enumeration with the plain transformer, and against next-token probabilities."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from helpers import refused
from tiny import MASK, tiny_model
from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError, RequestError
from unmask.eval.likelihood import LikelihoodEstimator

IDS = [random.Random(5).randrange(MASK) for _ in range(40)]


def model_of(block_size: int | None, family: str = "llama", **special: int) -> LanguageModel:
    special |= {} if block_size is None else {"mask_id": MASK, "block_size": block_size}
    return LanguageModel(tiny_model(family, dtype=torch.float64, **special), None, name="tiny")


def block_loss(model: LanguageModel, ids: list[int], start: int, masked: tuple[int, ...], block_size: int) -> float:
    """-log p of the masked positions of a block by a forward over the whole noisy prefix, with nothing cached."""
    stop = min(start + block_size, len(ids))
    noisy = [MASK if p in masked else ids[p] for p in range(stop)]
    logits_TV = model.logits(noisy, block_size=block_size).double()
    logits_TV[:, MASK] = -math.inf
    chosen = logits_TV.log_softmax(-1)
    return -sum(float(chosen[p, ids[p]]) for p in masked)


def enumerated(model: LanguageModel, ids: list[int], first: int, block_size: int) -> float:
    """The NELBO by its definition: every subset of every block's positions to score."""
    total = 0.0
    for start in range(first // block_size * block_size, len(ids), block_size):
        places = range(max(start, first), min(start + block_size, len(ids)))
        m = len(places)
        for k in range(1, m + 1):
            subsets = list(itertools.combinations(places, k))
            total += sum(m / k * block_loss(model, ids, start, s, block_size) for s in subsets) / len(subsets) / m
    return total


@pytest.mark.parametrize("shift", [{}, {"start_id": 1}], ids=["same-position", "shifted"])
@pytest.mark.parametrize("first", [0, 3, 4, 7, 9])
def test_small_blocks_are_enumerated(first: int, shift: dict[str, int]) -> None:
    model = model_of(4, **shift)
    found = LikelihoodEstimator(model, samples=15).score(IDS[:first], IDS[first:14])
    assert found.exact
    assert found.error == 0.0
    assert found.tokens == 14 - first
    assert found.value == pytest.approx(-enumerated(model, IDS[:14], first, 4), rel=1e-5)


def test_the_estimate_is_unbiased_and_its_error_honest() -> None:
    model = model_of(8)
    truth = -enumerated(model, IDS[:14], 3, 8)
    found = [LikelihoodEstimator(model, samples=6, seed=seed).score(IDS[:3], IDS[3:14]) for seed in range(60)]
    assert not any(each.exact for each in found)
    mean = sum(each.value for each in found) / len(found)
    spread = math.sqrt(sum((each.value - mean) ** 2 for each in found) / (len(found) - 1))
    assert abs(mean - truth) < 4 * spread / math.sqrt(len(found))
    # Stratified draws vary less than the independent ones that the standard error assumes.
    claimed = math.sqrt(sum(each.error**2 for each in found) / len(found))
    assert 0.5 * spread < claimed < 3 * spread


def test_more_samples_say_more() -> None:
    model = model_of(8)
    few, many = (LikelihoodEstimator(model, samples=n).score(IDS[:3], IDS[3:40]).error for n in (4, 64))
    assert many < few / 2


def test_draws_depend_on_the_tokens_and_the_seed_only() -> None:
    model = model_of(8)
    estimator = LikelihoodEstimator(model, samples=4)
    first = estimator.score(IDS[:9], IDS[9:30])
    for other in ((IDS[:9], IDS[9:33]), (IDS[:2], IDS[2:9]), (IDS[5:20], IDS[:8])):
        estimator.score(*other)
    assert estimator.score(IDS[:9], IDS[9:30]).value == pytest.approx(first.value, rel=1e-9)
    assert LikelihoodEstimator(model, samples=4, seed=1).score(IDS[:9], IDS[9:30]).value != first.value


@pytest.mark.parametrize("max_num_batched_tokens", [8, 24, 512])
def test_how_forwards_are_cut_does_not_matter(max_num_batched_tokens: int) -> None:
    model = model_of(8)
    found = LikelihoodEstimator(model, samples=5, max_num_batched_tokens=max_num_batched_tokens).score(IDS[:11], IDS[11:])
    assert found.value == pytest.approx(LikelihoodEstimator(model, samples=5).score(IDS[:11], IDS[11:]).value, rel=1e-6)


def test_shared_contexts_are_computed_once() -> None:
    estimator = LikelihoodEstimator(model_of(8), samples=4)
    estimator.score(IDS[:32], IDS[32:36])
    before = estimator.forwards
    estimator.score(IDS[:32], IDS[36:40])
    assert estimator.forwards == before + 1, "only the draws"


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 512])
def test_autoregressive_likelihood_is_exact(max_num_batched_tokens: int) -> None:
    model = model_of(None)
    logprobs_TV = model.logits(IDS, block_size=1).double().log_softmax(-1)
    estimator = LikelihoodEstimator(model, max_num_batched_tokens=max_num_batched_tokens)
    for first in (1, 5, 39):
        found = estimator.score(IDS[:first], IDS[first:])
        assert found.exact
        assert found.value == pytest.approx(sum(float(logprobs_TV[p - 1, IDS[p]]) for p in range(first, 40)), rel=1e-5)


def test_a_block_of_one_is_a_chain_of_next_tokens() -> None:
    """With block size 1 the bound is the likelihood itself, so multiple choice by it is multiple choice by likelihood."""
    model = model_of(1)
    choices = [[7, 3, 9], [1, 2], [30, 31, 32, 33]]
    estimator = LikelihoodEstimator(model, samples=2)
    found = [estimator.score(IDS[:6], choice) for choice in choices]
    assert all(each.exact for each in found)
    for choice, each in zip(choices, found, strict=True):
        ids = [*IDS[:6], *choice]
        chain = sum(-block_loss(model, ids, p, (p,), 1) for p in range(6, len(ids)))
        assert each.value == pytest.approx(chain, rel=1e-5)


def test_int8_kernels_agree_with_plain_weights() -> None:
    model = tiny_model("llama", mask_id=MASK, block_size=8, hidden_size=64, head_dim=16, ffn_size=128)
    plain = LikelihoodEstimator(LanguageModel(model, None, name="plain")).score(IDS[:9], IDS[9:30])
    packed = LikelihoodEstimator(LanguageModel(model, None, name="packed", quantize="auto")).score(IDS[:9], IDS[9:30])
    assert packed.value == pytest.approx(plain.value, rel=0.05)


def test_what_cannot_be_scored() -> None:
    estimator = LikelihoodEstimator(model_of(None))
    with refused(RequestError, "context"):
        estimator.score([], [1])
    with refused(RequestError, "continuation"):
        estimator.score([1], [])
    with refused(RequestError, "context", 128):
        estimator.score([1] * 120, [1] * 9)
    with refused(ConfigError, 2):
        LikelihoodEstimator(model_of(8), samples=1)
