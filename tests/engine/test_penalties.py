"""Penalties: what they do to logits, and that what they depend on is the same however the text is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny import MASK, tiny_model
from unmask.diffusion.decode import candidates
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.penalties import REPEATED
from unmask.engine.reference import generate_reference
from unmask.engine.request import Request
from unmask.engine.sampler import process
from unmask.engine.sampling_params import ResolvedParams
from unmask.engine.sequences.base import ScheduledSequence
from unmask.models.arch.transformer import Transformer

START, VOCAB = 1, 61
PROMPT = (5, 17, 3, 40, 8, 22, 9, 31, 2)
PENALTIES: tuple[dict[str, Any], ...] = (
    {"frequency_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"presence_penalty": -0.5},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_p": 0.02},
)

LENIENT: tuple[dict[str, Any], ...] = ({"presence_penalty": -0.5}, {"repetition_penalty": 0.8})
"""Those that favour repetition."""


def logits_of(count: int) -> Tensor:
    return 3 * torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(4))


def scheduled_of(
    tokens: Sequence[int],
    queries: Sequence[int],
    *,
    prompt: Sequence[int | None] = PROMPT,
    left_to_right: bool = True,
    **options: Any,
) -> ScheduledSequence:
    request = Request(tuple(prompt), ResolvedParams(**options))
    at, stop = tuple(queries), len(tokens)
    return ScheduledSequence(request, tokens, 0, stop, at, at, 0, 4, 0, {}, left_to_right=left_to_right)


def by_hand(logits_V: Tensor, prompt: Sequence[int], before: Sequence[int], params: ResolvedParams) -> Tensor:
    """The logits behind the tokens `before` of a completion, penalised one token at a time."""
    logits_V, counts = logits_V.float().clone(), Counter(before)
    for token in {*prompt, *before}:
        by = params.repetition_penalty
        if by != 1:
            logits_V[token] = logits_V[token] / by if logits_V[token] > 0 else logits_V[token] * by
    for token, count in counts.items():
        logits_V[token] -= params.frequency_penalty * count
        logits_V[token] -= params.presence_penalty
    if size := params.no_repeat_ngram_size:
        ngrams = [tuple(before[i : i + size]) for i in range(len(before) - size + 1)]
        end = tuple(before[len(before) - size + 1 :])
        for token in {ngram[-1] for ngram in ngrams if ngram[:-1] == end}:
            logits_V[token] -= REPEATED
    return logits_V


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_penalties_are_what_they_say(options: dict[str, Any]) -> None:
    params, new = ResolvedParams(**options), [7, 30, 7, 5, 7, 30, 7]
    processed_NV = process(logits_of(1), [scheduled_of([*PROMPT, *new], [len(PROMPT) + 7], **options)], MASK, START)
    expected_V = by_hand(logits_of(1)[0], (START, *PROMPT), new, params)
    expected_V[MASK] = float("-inf")
    torch.testing.assert_close(processed_NV[0], expected_V)
    assert not torch.equal(expected_V[:MASK], logits_of(1)[0, :MASK])


def test_they_come_after_biases_and_before_bans() -> None:
    scheduled = scheduled_of([*PROMPT, 7, 7], [11], logit_bias={7: 50.0, 3: float("-inf")}, repetition_penalty=2.0)
    (processed_V,) = process(torch.zeros(1, VOCAB), [scheduled], None)
    assert processed_V[7] == 25
    assert processed_V[3] == -float("inf")
    ending = scheduled._replace(
        request=replace(scheduled.request, eos_ids=frozenset([7]), params=scheduled.request.params.replace(min_new_tokens=5)),
    )
    assert process(torch.zeros(1, VOCAB), [ending], None)[0, 7] == -float("inf")


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_a_verify_token_sees_what_decoding_token_by_token_would_to_the_bit(options: dict[str, Any]) -> None:
    """A forward with five drafts and three masks, beside the forwards that decode the same tokens one by one."""
    new, logits_NV = [7, 30, 7, 5, 7, 30, 30], logits_of(7)
    canvas, first = [*PROMPT, *new, *[MASK] * 3], len(PROMPT) + 2
    verified_NV = process(
        logits_NV, [scheduled_of(canvas, range(first, first + 6), **options), scheduled_of(canvas, [9])], MASK, START
    )
    for row, query in enumerate(range(first, first + 6)):
        alone = process(logits_NV[row : row + 1], [scheduled_of(canvas[:query], [query], **options)], MASK, START)
        assert torch.equal(verified_NV[row], alone[0])


def test_a_block_sees_all_decided_tokens_but_its_own_position() -> None:
    """Left and right of it, in blocks before and in holes, but neither masks nor the prompt around the holes."""
    prompt = (5, None, 3, None, None, 8)
    canvas = [5, 7, 3, MASK, 9, 8, 9, 7, MASK, 30]
    options = {"frequency_penalty": 1.0, "prompt": prompt, "left_to_right": False}
    processed_NV = process(torch.zeros(2, VOCAB), [scheduled_of(canvas, [3, 4], **options)], MASK)
    for row, expected in enumerate(({7: -2, 9: -2, 30: -1}, {7: -2, 9: -1, 30: -1})):
        assert {token: value for token, value in enumerate(processed_NV[row, :MASK].tolist()) if value} == expected


def test_a_block_repeats_no_ngram_from_either_side() -> None:
    """... 7 9 30 ... ? 9 30, ... 7 ? 30 and 7 9 ?: at each of the three positions the missing token would repeat it."""
    start = len(PROMPT)
    for missing in range(3):
        ngram = [7, 9, 30]
        again = [MASK if i == missing else token for i, token in enumerate(ngram)]
        canvas = [*PROMPT, 11, *ngram, 12, *again, 13]
        scheduled = scheduled_of(canvas, [start + 5 + missing], no_repeat_ngram_size=3, left_to_right=False)
        (processed_V,) = process(torch.zeros(1, VOCAB), [scheduled], None)
        assert torch.nonzero(processed_V < 0).flatten().tolist() == [ngram[missing]]


def shifted() -> Transformer:
    model = tiny_model("qwen3", 4, torch.float64)
    model.config = replace(model.config, mask_id=MASK, block_size=4, start_id=START)
    return model


@cache
def models() -> tuple[LanguageModel, LanguageModel]:
    """A shifted model and the autoregressive one with its weights."""
    parent = tiny_model("qwen3", 4, torch.float64)
    return LanguageModel(shifted(), None, name="tiny"), LanguageModel(parent, None, name="ar")


def token_by_token(request: Request, count: int) -> tuple[int, ...]:
    """A plain loop over the parent's logits."""
    text, new = [START, *PROMPT], list[int]()
    for _ in range(count):
        logits_V = by_hand(models()[1].logits([*text, *new])[-1], text, new, request.params)
        position, key = torch.tensor([len(PROMPT) + len(new)]), {"sample": request.sample, "seed": request.noise_seed}
        new.append(int(candidates(logits_V[None], position, 0, request.params, MASK, **key)[0]))
    return tuple(new)


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_speculative_decoding_writes_the_text_of_decoding_token_by_token(options: dict[str, Any]) -> None:
    """At both temperatures and with several seeds, whatever the drafts, the neighbours and the room in the cache."""
    model, parent = models()
    keys: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8}, {"temperature": 0.8, "seed": 5})
    drafting = ({"block_size": 4, "threshold": 0.0}, {"block_size": 8, "threshold": 0.1}, {"block_size": 1})
    rules = {"max_new_tokens": 8, **options}
    expected = [token_by_token(model.request(PROMPT, **rules, **key), 8) for key in keys]
    if options not in LENIENT:
        assert expected[0] != model.complete(PROMPT, max_new_tokens=8).ids
    requests = [model.request(PROMPT, **rules, **key, **each) for key in keys for each in drafting]
    other = model.request(PROMPT[:6], max_new_tokens=9, frequency_penalty=0.5)
    for limits in ({}, {"num_tokens": 66, "cache_block_size": 3, "max_num_batched_tokens": 12}):
        found = model.engine(**limits).run([other, *requests])[1:]
        assert [each.ids for each in found] == [ids for ids in expected for _ in drafting]
    if not options.keys() & {"repetition_penalty", "min_p"}:
        assert parent.complete((START, *PROMPT), logit_bias={MASK: float("-inf")}, **rules).ids == expected[0]


def test_block_diffusion_equals_the_reference() -> None:
    """Also with holes, editing and draws."""
    model = tiny_model("llama", 2, torch.float64)
    ways: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8}, {"edit_threshold": 0.2, "max_post_steps": 3})
    params = ResolvedParams(block_size=4, steps=4, threshold=0.2, max_new_tokens=10)
    rules = [params.replace(**options, **ways[number % 3]) for number, options in enumerate(PENALTIES)]
    requests = [Request((*PROMPT[:number], None, 4), each) for number, each in enumerate(rules, 1)]
    found = Engine(model, mask_id=MASK).run(requests)
    assert [each.ids for each in found] == [generate_reference(model, request, MASK).ids for request in requests]


def looping() -> LanguageModel:
    """A model that predicts one token everywhere, and others a little less."""
    model = tiny_model("llama", 4, torch.float64, std=0.05, mask_id=MASK, block_size=4, start_id=START)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
        model.embed.weight[:] = model.embed.weight[7]
    return LanguageModel(model, None, name="loop")


@pytest.mark.parametrize("mode", ["speculative", "diffusion"])
def test_a_model_that_loops_no_longer_does(mode: str) -> None:
    model, options = looping(), {"max_new_tokens": 24, "mode": mode}
    assert len(set(model.complete(PROMPT, **options).ids)) == 1
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert len(set(model.complete(PROMPT, **options, threshold=1.0, **penalty).ids)) > 12, penalty
    once = model.complete(PROMPT, **options, threshold=1.0, no_repeat_ngram_size=1).ids
    assert len(set(once)) == 24
    pairs = model.complete(PROMPT, **options, threshold=1.0, no_repeat_ngram_size=2).ids
    assert len({*pairwise(pairs)}) == 23


def test_more_tokens_than_the_vocabulary_repeat_where_nothing_else_is_left() -> None:
    ids = looping().complete(PROMPT, max_new_tokens=62, no_repeat_ngram_size=1).ids
    assert len(set(ids[:60])) == 60, "every token but the mask"
    assert MASK not in ids


def test_no_penalty_needs_no_logits() -> None:
    assert not Request(PROMPT).needs_logits
    assert not ResolvedParams(repetition_penalty=1, frequency_penalty=0).has_penalties
    for options in PENALTIES:
        assert Request(PROMPT, ResolvedParams(**options)).needs_logits
