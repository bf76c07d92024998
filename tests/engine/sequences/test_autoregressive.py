"""Next-token decoding against a plain loop without a cache, alone and in batches; drafts are `test_speculative.py`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from helpers import refused
from tiny import FAMILIES, VOCAB, tiny_model, with_params
from unmask.diffusion.decode import candidates
from unmask.engine.engine import Engine
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import RequestError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer

MODELS = {family: tiny_model(family, 4, torch.float64) for family in FAMILIES}
GREEDY = ResolvedParams(prompt_lookup=False)
SAMPLED = GREEDY.replace(temperature=1.2, top_k=25, top_p=0.9, seed=6)


def prompt_of(length: int, max_new_tokens: int, *eos: int, rules: ResolvedParams = GREEDY) -> Request:
    return tiny.prompt_of(length, max_new_tokens, *eos, rules=rules)


def generate_batch(model: Transformer, requests: Sequence[Request], **options: Any) -> list[Completion]:
    engine = Engine(model, **{"prefix_cache": False, **options})
    completions = engine.run(requests)
    engine.pool.check()
    assert engine.pool.num_used == 0
    return completions


def generate(model: Transformer, request: Request) -> Completion:
    return generate_batch(model, [request])[0]


@torch.no_grad()
def naive(model: Transformer, prompt: Request) -> Completion:
    """The whole text anew for every token; row i of the logits predicts token i + 1."""
    text, rules = [token for token in prompt.ids if token is not None], prompt.params
    for count in range(1, prompt.params.max_new_tokens + 1):
        length = len(text)
        causal = torch.ones(1, length, length, dtype=torch.bool).tril()
        logits = model.head(model(torch.tensor([text]), torch.arange(length)[None], DenseAttend(causal)))[0, -1:]
        for banned, bias in prompt.params.logit_bias.items():
            logits[:, banned] += bias
        if count <= prompt.params.min_new_tokens:
            logits[:, sorted(prompt.eos_ids)] = float("-inf")
        if rules.temperature == 0.0:
            token = int(logits.argmax())
        else:
            key = {"sample": prompt.sample, "seed": prompt.noise_seed}
            token = int(candidates(logits, torch.tensor([length]), 0, rules, None, **key)[0])
        text.append(token)
        if token in prompt.eos_ids:
            return Completion(tuple(text[len(prompt.ids) :]), "stop", count)
    return Completion(tuple(text[len(prompt.ids) :]), "length", prompt.params.max_new_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 9])
def test_one_sequence_equals_the_plain_loop(family: str, rules: ResolvedParams, length: int) -> None:
    found = generate(MODELS[family], prompt_of(length, 14, rules=rules))
    assert found == naive(MODELS[family], prompt_of(length, 14, rules=rules))
    assert found.forwards == len(found.ids) == 14


def test_greedy_ignores_seed_and_filters() -> None:
    model = MODELS["llama"]
    found = generate(model, prompt_of(5, 12, rules=SAMPLED.replace(temperature=0.0)))
    assert found == naive(model, prompt_of(5, 12))
    sampled = {generate(model, prompt_of(5, 12, rules=SAMPLED.replace(seed=s))).ids for s in (0, 7, 14, 21)}
    other = generate(model, replace(prompt_of(5, 12, rules=SAMPLED.replace(seed=0)), sample=1)).ids
    assert len(sampled | {found.ids, other}) == 6


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_end_stops_it_and_one_in_the_prompt_does_not(family: str) -> None:
    model = MODELS[family]
    endless = generate(model, prompt_of(4, 12)).ids
    for token in set(endless):
        prompt = prompt_of(4, 12, token)
        found = generate(model, prompt)
        assert found.ids == endless[: endless.index(token) + 1]
        assert (found.finish_reason, found.forwards) == ("stop", len(found.ids))
    unused = next(token for token in prompt_of(4, 12).ids if token not in endless)
    assert generate(model, prompt_of(4, 12, unused)).ids == endless


def mixed_prompts(model: Transformer, rules: ResolvedParams = GREEDY) -> list[Request]:
    """Unlike lengths and budgets, and ends after unlike numbers of tokens."""
    prompts = [prompt_of(length, budget, rules=rules) for length, budget in [(3, 9), (11, 4), (1, 14), (7, 1), (7, 12)]]
    end = naive(model, prompts[4]).ids[5]
    return [*prompts[:4], replace(prompts[4], eos_ids=frozenset([end])), replace(prompts[2], eos_ids=frozenset([end]))]


@pytest.mark.parametrize(("family", "rules"), [("llama", GREEDY), ("qwen2", SAMPLED), ("qwen3", GREEDY), ("llada2", SAMPLED)])
def test_a_batch_equals_its_sequences_one_by_one(family: str, rules: ResolvedParams) -> None:
    model = MODELS[family]
    prompts = mixed_prompts(model, rules)
    batch = generate_batch(model, prompts)
    assert batch == [naive(model, prompt) for prompt in prompts]
    assert len({len(completion.ids) for completion in batch}) >= 4
    assert generate_batch(model, prompts[::-1]) == batch[::-1]
    mixed = [
        replace(prompt, params=(rules, GREEDY, SAMPLED)[n % 3].replace(max_new_tokens=prompt.params.max_new_tokens))
        for n, prompt in enumerate(prompts)
    ]
    assert generate_batch(model, mixed) == [naive(model, prompt) for prompt in mixed], "each by its own rules"


@pytest.mark.parametrize(
    "options",
    [
        {"cache_block_size": 3, "num_tokens": 21, "max_num_batched_tokens": 4},
        {"cache_block_size": 1, "prefix_cache": True, "max_num_seqs": 2},
        {"cache_block_size": 5, "num_tokens": 20, "prefix_cache": True, "max_num_batched_tokens": 1},
    ],
    ids=["preempted, in chunks", "prefix-cached", "one row at a time"],
)
def test_cache_blocks_chunks_and_preemption_change_no_token(options: dict[str, Any]) -> None:
    model = MODELS["llama"]
    drafted = [with_params(prompt, prompt_lookup=True) for prompt in mixed_prompts(model)]
    prompts = [*mixed_prompts(model), *mixed_prompts(model, SAMPLED), *drafted]
    found = generate_batch(model, prompts, **options)
    assert [(c.ids, c.finish_reason) for c in found] == [
        (c.ids, c.finish_reason) for c in (naive(model, prompt) for prompt in prompts)
    ]
    if "num_tokens" in options and options["max_num_batched_tokens"] > 1:
        assert any(completion.costs.preemptions for completion in found)
    if options.get("prefix_cache") and options["cache_block_size"] == 1:
        assert any(completion.costs.cached_tokens for completion in found)


def test_bias_and_least_length_hold() -> None:
    model = MODELS["llama"]
    endless = naive(model, prompt_of(4, 12)).ids
    late = with_params(prompt_of(4, 12, endless[1], endless[6]), min_new_tokens=4, logit_bias={endless[3]: -2.0, 7: 3.0})
    assert generate(model, late) == naive(model, late)
    assert not {endless[1], endless[6]} & set(generate(model, late).ids[:4])


def test_the_batch_shrinks_as_sequences_end() -> None:
    """Every forward holds exactly one row of each sequence that still goes on, prompts in the first one apart."""
    model = MODELS["llama"]
    prompts = mixed_prompts(model)
    widths: list[int] = []
    counter = model.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape[1]))
    lengths = [len(completion.ids) for completion in generate_batch(model, prompts)]
    counter.remove()
    going = [sum(length > n for length in lengths) for n in range(max(lengths))]
    assert len(set(going)) >= 4
    assert widths == [sum(len(prompt.ids) for prompt in prompts), *going[1:]]


def test_equal_lengths_need_no_padding() -> None:
    model = MODELS["qwen2"]
    prompts = [
        replace(prompt_of(6, 8), ids=tuple(((t or 0) + shift) % VOCAB for t in prompt_of(6, 8).ids)) for shift in range(3)
    ]
    assert generate_batch(model, prompts) == [naive(model, prompt) for prompt in prompts]


def test_a_banned_token_is_never_produced() -> None:
    model = MODELS["llama"]
    favourite = naive(model, prompt_of(4, 1)).ids[0]
    banned = with_params(prompt_of(4, 12), logit_bias={favourite: float("-inf")})
    found = generate(model, banned)
    assert favourite not in found.ids
    assert found == naive(model, banned)


@pytest.mark.parametrize("others", [[], [9, 3], [9, 9, 9, 9]], ids=["alone", "leaving", "staying in the batch"])
def test_every_token_is_reported_once_in_order(others: list[int]) -> None:
    model, engine = MODELS["qwen3"], Engine(MODELS["qwen3"])
    first = engine.add(prompt_of(5, 6), watch=True)
    for n, budget in enumerate(others):
        engine.add(prompt_of(2 + n, budget))
    updates = []
    while engine.has_work:
        updates += engine.step()
    mine = [update for update in updates if update.number == first]
    ids = naive(model, prompt_of(5, 6)).ids
    assert [update.new_ids for update in mine] == [(token,) for token in ids]
    steps = [update.step for update in mine if update.step is not None]
    assert [(s.tokens, s.guess, s.accepted, s.fixed, s.edited) for s in steps] == [
        ((t,), (t,), (True,), (False,), (False,)) for t in ids
    ]
    assert [s.start for s in steps] == list(range(5, 11)), "absolute positions of the new tokens"
    assert [s.forwards for s in steps] == list(range(1, 7))
    assert mine[-1].completion == naive(model, prompt_of(5, 6))
    assert all(update.step is None for update in updates if update.number != first), "nobody asked to watch the others"
    with torch.no_grad():
        text = torch.tensor([[*prompt_of(5, 6).ids]])
        mask = DenseAttend(torch.ones(1, 5, 5, dtype=torch.bool).tril())
        shares = model.head(model(text, torch.arange(5)[None], mask))[0, -1].softmax(-1)
    assert steps[0].confidence[0] == pytest.approx(float(shares.max()), rel=1e-6)
    assert isinstance(steps[0], DecodingStep)


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (Request((), ResolvedParams(max_new_tokens=3)), ("prompt token",)),
        (Request((1,), ResolvedParams(max_new_tokens=0)), ("max_new_tokens", 0)),
        (Request((VOCAB,), ResolvedParams(max_new_tokens=3)), ("prompt token", VOCAB)),
        (
            Request((1, None, 2), ResolvedParams(max_new_tokens=3)),
            ("autoregressive", "holes"),
        ),
        (prompt_of(100, 29), ("context", 128)),
    ],
)
def test_impossible_requests_are_refused(request_: Request, names: tuple[object, ...]) -> None:
    engine = Engine(MODELS["llama"])
    with refused(RequestError, *names):
        engine.add(request_)
    assert not engine.has_work
    assert engine.run([]) == []


def test_the_context_may_be_filled_to_the_end() -> None:
    assert len(generate(MODELS["llama"], prompt_of(124, 4)).ids) == 4
