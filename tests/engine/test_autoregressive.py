"""Next-token decoding against a plain loop without a cache, alone and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tiny import FAMILIES, VOCAB, tiny_model
from unmask.diffusion.decode import DecodeRules, candidates
from unmask.engine.autoregressive import generate_autoregressive, generate_batch
from unmask.engine.completion import Completion, Prompt, Step
from unmask.errors import RequestError
from unmask.models.attention import DenseAttend
from unmask.models.transformer import Transformer

MODELS = {family: tiny_model(family, 4, torch.float64) for family in FAMILIES}
GREEDY = DecodeRules()
SAMPLED = DecodeRules(temperature=1.2, top_k=25, top_p=0.9, seed=6)


def prompt_of(length: int, max_new_tokens: int, *eos: int) -> Prompt:
    generator = torch.Generator().manual_seed(length)
    return Prompt(tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist()), max_new_tokens, frozenset(eos))


@torch.no_grad()
def naive(model: Transformer, prompt: Prompt, rules: DecodeRules = GREEDY, mask_id: int | None = None) -> Completion:
    """The whole text anew for every token; row i of the logits predicts token i + 1."""
    text = list(prompt.ids)
    for count in range(1, prompt.max_new_tokens + 1):
        length = len(text)
        causal = torch.ones(1, length, length, dtype=torch.bool).tril()
        logits = model.head(model(torch.tensor([text]), torch.arange(length)[None], DenseAttend(causal)))[0, -1:]
        if rules.temperature == 0.0 and mask_id is None:
            token = int(logits.argmax())
        else:
            token = int(candidates(logits, torch.tensor([length]), 0, rules, mask_id)[0])
        text.append(token)
        if token in prompt.eos_ids:
            return Completion(tuple(text[len(prompt.ids) :]), "stop", count)
    return Completion(tuple(text[len(prompt.ids) :]), "length", prompt.max_new_tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_one_sequence_equals_the_plain_loop(family: str, rules: DecodeRules, length: int) -> None:
    found = generate_autoregressive(MODELS[family], prompt_of(length, 14), rules)
    assert found == naive(MODELS[family], prompt_of(length, 14), rules)
    assert found.forwards == len(found.ids) == 14


def test_greedy_ignores_seed_and_filters() -> None:
    found = generate_autoregressive(MODELS["llama"], prompt_of(5, 12), replace(SAMPLED, temperature=0.0))
    assert found == naive(MODELS["llama"], prompt_of(5, 12))
    sampled = {generate_autoregressive(MODELS["llama"], prompt_of(5, 12), replace(SAMPLED, seed=s)).ids for s in range(4)}
    assert len(sampled | {found.ids}) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_stops_it_and_one_in_the_prompt_does_not(family: str) -> None:
    model = MODELS[family]
    endless = generate_autoregressive(model, prompt_of(4, 12), GREEDY).ids
    for token in set(endless):
        prompt = prompt_of(4, 12, token)
        found = generate_autoregressive(model, prompt, GREEDY)
        assert found.ids == endless[: endless.index(token) + 1]
        assert (found.finish_reason, found.forwards) == ("stop", len(found.ids))
    unused = next(token for token in prompt_of(4, 12).ids if token not in endless)
    assert generate_autoregressive(model, prompt_of(4, 12, unused), GREEDY).ids == endless


def mixed_prompts(model: Transformer) -> list[Prompt]:
    """Unlike lengths and budgets, and ends after unlike numbers of tokens."""
    prompts = [prompt_of(length, budget) for length, budget in [(3, 9), (11, 4), (1, 14), (7, 1), (7, 12)]]
    end = naive(model, prompts[4]).ids[5]
    return [*prompts[:4], replace(prompts[4], eos_ids=frozenset([end])), replace(prompts[2], eos_ids=frozenset([end]))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_equals_its_sequences_one_by_one(family: str, rules: DecodeRules) -> None:
    model = MODELS[family]
    prompts = mixed_prompts(model)
    batch = generate_batch(model, prompts, rules)
    assert batch == [naive(model, prompt, rules) for prompt in prompts]
    assert len({len(completion.ids) for completion in batch}) >= 4
    assert generate_batch(model, prompts[::-1], rules) == batch[::-1]


def test_the_batch_shrinks_as_sequences_end() -> None:
    """Leaving copies the cache, so that a few ended sequences may stay; never a quarter of the batch."""
    model = MODELS["llama"]
    prompts = mixed_prompts(model)
    widths: list[int] = []
    counter = model.register_forward_pre_hook(lambda _, arguments: widths.append(len(arguments[0])))
    lengths = [len(completion.ids) for completion in generate_batch(model, prompts, GREEDY)]
    counter.remove()
    going = [sum(length > n for length in lengths) for n in range(max(lengths))]
    assert len(widths) == len(going)
    assert len(set(going)) >= 4
    assert all(0.75 * width < still <= width for width, still in zip(widths, going, strict=True))
    assert widths == sorted(widths, reverse=True)


def test_equal_lengths_need_no_padding() -> None:
    model = MODELS["qwen2"]
    prompts = [replace(prompt_of(6, 8), ids=tuple((t + shift) % VOCAB for t in prompt_of(6, 8).ids)) for shift in range(3)]
    assert generate_batch(model, prompts, GREEDY) == [naive(model, prompt) for prompt in prompts]


def test_a_banned_token_is_never_produced() -> None:
    model = MODELS["llama"]
    favourite = naive(model, prompt_of(4, 1)).ids[0]
    found = generate_batch(model, [prompt_of(4, 12)], GREEDY, mask_id=favourite)[0]
    assert favourite not in found.ids
    assert found == naive(model, prompt_of(4, 12), GREEDY, mask_id=favourite)


@pytest.mark.parametrize("others", [[], [9, 3], [9, 9, 9, 9]], ids=["alone", "leaving", "staying in the batch"])
def test_every_token_is_reported_once_in_order(others: list[int]) -> None:
    model, steps = MODELS["qwen3"], list[Step]()
    prompts = [prompt_of(5, 6), *(prompt_of(2 + n, budget) for n, budget in enumerate(others))]
    first = generate_batch(model, prompts, GREEDY, on_step=steps.append)[0]
    assert [(s.tokens, s.guess, s.accepted, s.fixed) for s in steps] == [((t,), (t,), (True,), 0) for t in first.ids]
    assert [s.start for s in steps] == list(range(5, 11)), "absolute positions of the new tokens"
    assert [s.forwards for s in steps] == list(range(1, 7))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt token"),
        ([Prompt((), 3, frozenset())], "at least one prompt token"),
        ([prompt_of(2, 3), Prompt((1,), 0, frozenset())], "max_new_tokens is 0"),
        ([prompt_of(2, 3), Prompt((VOCAB,), 3, frozenset())], f"prompt token {VOCAB} is outside the vocabulary"),
        ([prompt_of(100, 29)], "exceeds the context of 128"),
    ],
)
def test_impossible_requests_are_refused(prompts: Sequence[Prompt], message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        generate_batch(MODELS["llama"], prompts, GREEDY)
    assert "\n" not in str(error.value)


def test_the_context_may_be_filled_to_the_end() -> None:
    model = MODELS["llama"]
    assert len(generate_autoregressive(model, prompt_of(124, 4), GREEDY).ids) == 4
