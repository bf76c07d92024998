"""Shifted models in the engine. That all its paths equal the oracle is the conformance suite's; here: what shifting means."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from helpers import refused
from tiny import FAMILIES, MASK, tiny_model
from unmask.diffusion.decode import candidates
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.loading import load
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sampling_params import SPECULATIVE_THRESHOLD, THRESHOLD, ResolvedParams
from unmask.errors import RequestError
from unmask.eval.likelihood import LikelihoodEstimator
from unmask.models.arch.gated_lora import add_gated_lora, is_gated_lora, parent_config
from unmask.models.arch.transformer import Transformer, reconfigured

START = 1
PROMPT = (5, 17, 3, 40, 8, 22, 9, 31, 2)
AUTOREGRESSIVE = {family: tiny_model(family, 4, torch.float64) for family in FAMILIES}


def shifted(family: str, block_size: int = 4) -> Transformer:
    """The same weights as a shifted model."""
    model = tiny_model(family, 4, torch.float64)
    model.config = replace(model.config, mask_id=MASK, block_size=block_size, start_id=START)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_one_decode_as_the_parent_does(family: str) -> None:
    """Token by token, in no more forwards."""
    rules = ResolvedParams(block_size=1, steps=1, prompt_lookup=False)
    (parent,) = Engine(AUTOREGRESSIVE[family]).run(
        [Request((START, *PROMPT), rules.replace(max_new_tokens=20, logit_bias={MASK: float("-inf")}))]
    )
    (found,) = Engine(shifted(family, 1)).run([Request(PROMPT, rules.replace(max_new_tokens=20))])
    assert found.ids == parent.ids
    assert found.forwards <= parent.forwards


def test_logits_of_blocks_of_one_are_the_parents() -> None:
    model, parent = (LanguageModel(each, None, name="tiny") for each in (shifted("llama"), AUTOREGRESSIVE["llama"]))
    found, expected = model.logits(PROMPT, block_size=1), parent.logits((START, *PROMPT[:-1]))
    torch.testing.assert_close(found, expected)
    other = model.logits((*PROMPT[:-1], 50), block_size=1)
    assert torch.equal(found, other), "no row reads the last id"


@pytest.mark.parametrize("family", FAMILIES)
def test_decided_tokens_are_cached_as_by_the_parent(family: str) -> None:
    """Keys and values of prompt and finished blocks are the parent's over the same text, whatever the block size."""
    model, parent = shifted(family, 8), AUTOREGRESSIVE[family]
    request = Request(PROMPT, ResolvedParams(block_size=8, steps=8, threshold=0.2, max_new_tokens=23))
    engine = Engine(model, cache_block_size=8, num_tokens=64)
    (completion,) = engine.run([request])
    text = (START, *PROMPT, *completion.ids)[:24]
    theirs = Engine(parent, cache_block_size=8, num_tokens=64)
    theirs.run([Request(text, ResolvedParams(block_size=1, steps=1, max_new_tokens=1))])
    caches = [each.runner.kv_cache[:, :, :3] for each in (engine, theirs)]
    torch.testing.assert_close(*caches, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("first", [1, 4, 6])
def test_the_bound_of_blocks_of_one_is_the_parents_likelihood(first: int) -> None:
    model, parent = (LanguageModel(each, None, name="tiny") for each in (shifted("qwen3", 1), AUTOREGRESSIVE["qwen3"]))
    found = LikelihoodEstimator(model, samples=2).score(PROMPT[:first], PROMPT[first:])
    # The parent may predict the mask token; the difference is what it gives that one.
    logits_TV = parent.logits((START, *PROMPT[:-1])).double()
    logits_TV[:, MASK] = float("-inf")
    chain = sum(float(logits_TV.log_softmax(-1)[p, PROMPT[p]]) for p in range(first, len(PROMPT)))
    assert found.exact
    assert found.value == pytest.approx(chain, rel=1e-5)


SPECULATIVE = {"mode": "speculative", "steps": 4}
SPECULATIVE_CASES = [
    *(("llama", threshold, size) for threshold in (0.0, 0.3, 1.0) for size in (1, 2, 4, 8)),
    *(("qwen2", 0.3, 4), ("qwen3", 0.0, 8), ("llada2", 0.3, 4)),
]


@cache
def parent_completions(family: str, prompts: tuple[tuple[int, ...], ...], budget: int, eos: frozenset[int]) -> list[Completion]:
    rules = ResolvedParams(block_size=1, steps=1)
    banned = {MASK: float("-inf")}
    requests = [Request((START, *ids), rules.replace(max_new_tokens=budget, logit_bias=banned), eos) for ids in prompts]
    return [Engine(AUTOREGRESSIVE[family], prefix_cache=False).run([request])[0] for request in requests]


@pytest.mark.parametrize(("family", "threshold", "block_size"), SPECULATIVE_CASES)
def test_speculative_text_is_the_parents(family: str, threshold: float, block_size: int) -> None:
    """For all drafts, neighbours, cache sizes and chunked prompts: ids and finish reason of the parent alone."""
    prompts = tuple(PROMPT[:n] for n in (1, 4, 5, 9))
    free = parent_completions(family, prompts, 17, frozenset())
    eos = frozenset([free[0].ids[6], free[2].ids[11]])
    rules = ResolvedParams(block_size=block_size, threshold=threshold, **SPECULATIVE)
    for ends in (frozenset[int](), eos):
        expected = parent_completions(family, prompts, 17, ends)
        requests = [Request(ids, rules.replace(max_new_tokens=17), ends, trace=True) for ids in prompts]
        for options in (
            {},
            {"cache_block_size": 3, "num_tokens": 33},
            {"max_num_batched_tokens": 8, "cache_block_size": 4},
            {"prefix_cache": False},
        ):
            engine = Engine(shifted(family), **options)
            engine.scheduler.prefill_chunk = 2
            for found, target in zip(engine.run(requests), expected, strict=True):
                assert (found.ids, found.finish_reason) == (target.ids, target.finish_reason), options
            engine.pool.check()
            assert engine.pool.num_used == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("block_size", [2, 8])
def test_gated_lora_changes_drafts_and_no_text(family: str, block_size: int) -> None:
    """At the draft tokens its guesses differ from those of the parent's weights; the text is the parent's."""
    prompts = tuple(PROMPT[:n] for n in (1, 5, 9))
    expected = parent_completions(family, prompts, 17, frozenset())
    rules = ResolvedParams(block_size=block_size, threshold=0.0, **SPECULATIVE)
    requests = [Request(ids, rules.replace(max_new_tokens=17), frozenset(), trace=True) for ids in prompts]
    plain, updated = shifted(family), add_gated_lora(shifted(family), 3, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in filter(is_gated_lora, updated.state_dict()):
            updated.get_parameter(name).normal_(std=0.4, generator=generator)
    for options in ({}, {"cache_block_size": 3, "num_tokens": 33}):
        found, others = (Engine(model, **options).run(requests) for model in (updated, plain))
        assert [each.ids for each in found] == [each.ids for each in expected]
        assert [each.trace for each in found] != [each.trace for each in others]


def repeating() -> Transformer:
    """A model that predicts the same token everywhere, and is sure of it."""
    model = shifted("llama")
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
        model.embed.weight[:] = model.embed.weight[7]
        model.head_weight[:] = -model.embed.weight[7]
        model.head_weight[7] = model.embed.weight[7]
    return model


def test_speculative_decoding_takes_at_most_a_forward_a_token_and_fewer_where_drafts_are_accepted() -> None:
    model = repeating()
    for block_size, threshold in ((4, 0.0), (8, 0.0), (4, 1.0), (1, 0.0)):
        rules = ResolvedParams(block_size=block_size, threshold=threshold, prompt_lookup=False, **SPECULATIVE)
        (found,) = Engine(model).run([Request(PROMPT, rules.replace(max_new_tokens=17))])
        assert found.forwards <= (17 if threshold == 1.0 else -(-17 // block_size)), (block_size, threshold)
        assert found.costs.prefill_forwards == 0
        assert found.costs.accepted_drafts == len(found.ids) - found.forwards


@pytest.mark.parametrize(
    ("options", "name"),
    [({"edit_threshold": 0.5}, "edit_threshold"), ({"preset": "speed"}, "preset"), ({"ids": (1, None, 2)}, "holes")],
)
def test_what_makes_nonsense_of_a_shifted_model_is_refused(options: dict[str, Any], name: str) -> None:
    model = LanguageModel(shifted("llama"), None, name="tiny")
    ids = options.pop("ids", PROMPT)
    for mode in ({}, {"mode": "diffusion"}):
        with refused(RequestError, "shifted", name):
            model.request(ids, **mode, **options)


def test_what_excludes_speculative_decoding_is_refused_or_decoded_without() -> None:
    model = LanguageModel(shifted("llama"), None, name="tiny")
    with refused(RequestError, "speculative", "policy"):
        model.complete(PROMPT, max_new_tokens=9, mode="speculative", policy="entropy")
    denoised = model.complete(PROMPT, max_new_tokens=9, mode="diffusion", policy="entropy")
    assert model.complete(PROMPT, max_new_tokens=9, policy="entropy") == denoised
    assert model.request(PROMPT, policy="entropy").params.mode == "diffusion"


def test_shifted_models_decode_speculatively_by_default() -> None:
    model, plain = LanguageModel(shifted("llama"), None, name="tiny"), LanguageModel(AUTOREGRESSIVE["llama"], None, name="ar")
    chosen = model.request(PROMPT)
    assert chosen.params.mode == "speculative"
    assert chosen.params.threshold == SPECULATIVE_THRESHOLD == 0.0
    assert model.request(PROMPT, threshold=0.9).params.threshold == 0.9
    assert model.request(PROMPT, mode="diffusion").params.threshold == THRESHOLD
    assert plain.request(PROMPT).params.mode == "speculative"  # by prompt lookup alone


def test_mode_ar_writes_the_speculative_text_token_by_token() -> None:
    model, plain = LanguageModel(shifted("llama"), None, name="tiny"), LanguageModel(AUTOREGRESSIVE["llama"], None, name="ar")
    for each in (model, plain):
        drafted, token_by_token = (each.complete(PROMPT, max_new_tokens=30, mode=mode) for mode in ("speculative", "ar"))
        assert token_by_token.ids == drafted.ids
        assert (token_by_token.forwards, token_by_token.costs.accepted_drafts) == (len(drafted.ids), 0)
        assert drafted.forwards <= token_by_token.forwards


def test_modes_that_a_model_was_not_trained_for_are_refused() -> None:
    diffusion = tiny_model("llama", 4, torch.float64)
    diffusion.config = replace(diffusion.config, mask_id=MASK, block_size=4)
    unshifted, plain = (LanguageModel(model, None, name="tiny") for model in (diffusion, AUTOREGRESSIVE["llama"]))
    for mode in ("ar", "speculative"):
        with refused(RequestError, mode, "shifted"):
            unshifted.complete(PROMPT, max_new_tokens=3, mode=mode)
    with refused(RequestError, "diffusion", "mask token"):
        plain.complete(PROMPT, max_new_tokens=3, mode="diffusion")


def test_logprobs_of_speculative_tokens_are_the_parents() -> None:
    model, plain = LanguageModel(shifted("llama"), None, name="tiny"), LanguageModel(AUTOREGRESSIVE["llama"], None, name="ar")
    found = model.complete(PROMPT, max_new_tokens=12, logprobs=2, threshold=0.0)
    parent = plain.complete((START, *PROMPT), max_new_tokens=12, logit_bias={MASK: float("-inf")})
    assert found.ids == parent.ids
    assert found.logprobs is not None
    assert [entry.token for entry in found.logprobs] == list(found.ids)
    text = [START, *PROMPT, *found.ids]
    logits_TV = plain.logits(text[:-1]).double()
    logits_TV[:, MASK] = float("-inf")
    expected = [float(row[token]) for row, token in zip(logits_TV.log_softmax(-1)[len(PROMPT) :], found.ids, strict=True)]
    assert [entry.logprob for entry in found.logprobs] == pytest.approx(expected, abs=1e-5)


def test_a_sampled_draft_is_accepted_if_the_parent_samples_it() -> None:
    """The same text at every threshold and block size, that of a plain loop over the parent."""
    model, plain = LanguageModel(shifted("qwen3"), None, name="tiny"), LanguageModel(AUTOREGRESSIVE["qwen3"], None, name="ar")
    options = {"temperature": 1.2, "top_k": 30, "seed": 3, "sample": 1}
    rules = ResolvedParams(block_size=4, temperature=1.2, top_k=30, seed=3)
    seed = Request(PROMPT, rules).noise_seed
    text = [START, *PROMPT]
    for _ in range(16):
        logits_1V, position = plain.logits(text)[-1:], torch.tensor([len(text) - 1])
        text.append(int(candidates(logits_1V, position, 0, rules, MASK, sample=1, seed=seed)[0]))
    for block_size, threshold in ((4, 0.0), (4, 0.1), (8, 0.0), (2, 0.3), (1, 1.0)):
        found = model.complete(PROMPT, max_new_tokens=16, block_size=block_size, threshold=threshold, **options)
        assert list(found.ids) == text[1 + len(PROMPT) :]
    assert model.complete(PROMPT, max_new_tokens=16, **{**options, "seed": 4}).ids != found.ids


def test_watched_steps_give_the_completion() -> None:
    """Every step begins after the tokens decided so far; unverified drafts are shown as guesses."""
    model, steps = LanguageModel(shifted("llama"), None, name="tiny"), list[DecodingStep]()
    completion = model.complete(PROMPT, max_new_tokens=15, threshold=0.0, on_step=steps.append)
    ids: list[int] = []
    for number, step in enumerate(steps, start=1):
        assert step.start == len(PROMPT) + len(ids)
        assert step.forwards == number
        assert not any(step.fixed)
        assert not any(step.edited)
        new = [token for token in step.tokens if token is not None]
        assert step.accepted == tuple(i < len(new) for i in range(len(step.tokens)))
        assert new == list(step.guess[: len(new)])
        ids += new
    assert tuple(ids) == completion.ids
    assert completion.forwards == len(steps)


@pytest.mark.slow
def test_the_embedded_gated_model_writes_its_parents_text() -> None:
    """With the weights as they are shipped and with 8-bit ones; in fewer forwards."""
    for quantize in ("none", "int8"):
        child = load("smollm2-135m-diffusion", dtype="float32", quantize=quantize)
        parent = LanguageModel(
            reconfigured(child.transformer, parent_config(child.transformer.config)), None, name="parent", quantize=quantize
        )
        for text in ("What is 17 + 25?", "Name three fruits, one to a line."):
            ids = child.encode_prompt(text)
            found = child.complete(ids, max_new_tokens=40)
            expected = parent.complete((child.config.start_id, *ids), max_new_tokens=40)
            assert found.ids == expected.ids
            assert found.forwards < expected.forwards
