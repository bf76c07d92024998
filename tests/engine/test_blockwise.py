"""Cached decoding against the oracle without a cache: the same tokens, and exactly the forwards it promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from tiny import FAMILIES, MASK, VOCAB, tiny_model
from unmask.diffusion.decode import DecodeRules
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.blockwise import BlockwiseDecoder, generate_blockwise
from unmask.engine.cache import KVCache
from unmask.engine.completion import Completion, Prompt, Step
from unmask.engine.reference import generate_reference
from unmask.errors import RequestError
from unmask.models.transformer import Transformer

MODELS = {family: tiny_model(family, 1) for family in FAMILIES}
THRESHOLDS = (0.0, 0.3, 0.95, 1.0)


def prompt_of(length: int, max_new_tokens: int, *eos: int) -> Prompt:
    generator = torch.Generator().manual_seed(100 + length)
    ids = torch.randint(0, MASK, (length,), generator=generator).tolist()
    return Prompt(tuple(ids), max_new_tokens, frozenset(eos))


def decode(model: Transformer, prompt: Prompt, rules: DecodeRules) -> tuple[Completion, list[Step]]:
    """Cached decoding, with what it reported; the model's calls are counted from outside."""
    calls: list[int] = []
    counter = model.register_forward_hook(lambda *_: calls.append(1))
    steps: list[Step] = []
    completion = generate_blockwise(model, prompt, rules, MASK, steps.append)
    counter.remove()
    check_steps(prompt, rules, completion, steps, len(calls))
    return completion, steps


def check_steps(prompt: Prompt, rules: DecodeRules, completion: Completion, steps: list[Step], calls: int) -> None:
    """The events, replayed, give the completion; forwards are one prefill, if any, and one per denoising step."""
    size, length = rules.block_size, len(prompt.ids)
    prefill = 1 if length >= size else 0
    assert [step.forwards for step in steps] == [prefill + n for n in range(1, len(steps) + 1)]
    assert completion.forwards == calls == prefill + len(steps)
    canvas: dict[int, int | None] = {}
    for step in steps:
        assert step.start % size == 0
        assert step.fixed == max(0, length - step.start)
        assert step.tokens[: step.fixed] == prompt.ids[step.start :]
        before = [canvas.get(step.start + i) for i in range(size)]
        for i in range(size):
            if i < step.fixed or before[i] is not None:
                assert (step.guess[i], step.accepted[i]) == (None, False)
                assert before[i] in (None, step.tokens[i]), "a decided token changed"
            else:
                assert step.guess[i] is not None
                assert step.guess[i] != MASK
                assert step.tokens[i] == (step.guess[i] if step.accepted[i] else None)
        assert any(step.accepted)
        canvas |= {step.start + i: token for i, token in enumerate(step.tokens)}
    new = [canvas[i] for i in range(length, max(canvas) + 1)]
    assert completion.ids == tuple(new[: len(completion.ids)])
    if completion.finish_reason == "length":
        assert len(completion.ids) == prompt.max_new_tokens
        assert prompt.eos_ids or None not in new, "only an end beyond the budget may leave something undecided"
        assert not prompt.eos_ids.intersection(completion.ids)
    else:
        assert prompt.eos_ids.intersection(completion.ids) == {completion.ids[-1]}
        assert len(completion.ids) <= prompt.max_new_tokens


def same_tokens(model: Transformer, prompt: Prompt, rules: DecodeRules) -> Completion:
    """Decode both ways; the oracle has no prefill."""
    completion, _ = decode(model, prompt, rules)
    oracle = generate_reference(model, prompt, rules, MASK)
    prefill = 1 if len(prompt.ids) >= rules.block_size else 0
    assert replace(completion, forwards=completion.forwards - prefill) == oracle, f"{prompt} {rules}"
    return completion


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_every_prompt_length_decodes_like_the_oracle(family: str, size: int) -> None:
    """All lengths modulo the block, none and several full blocks included; thresholds and steps take turns."""
    choices = list(product(THRESHOLDS, sorted({1, min(2, size), size})))
    used = 0
    for length in (*range(size + 1), 2 * size + size // 2):
        for _ in range(2 if size == 8 else 3):
            threshold, steps = choices[used % len(choices)]
            used += 1
            rules = DecodeRules(block_size=size, threshold=threshold, steps=steps)
            same_tokens(MODELS[family], prompt_of(length, size + size // 2 + 1), rules)
    assert used >= len(choices)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_every_threshold_and_step_count(threshold: float, steps: int) -> None:
    rules = DecodeRules(block_size=4, threshold=threshold, steps=steps)
    completion, events = decode(MODELS["qwen3"], prompt_of(6, 10), rules)
    assert completion == replace(generate_reference(MODELS["qwen3"], prompt_of(6, 10), rules, MASK), forwards=1 + len(events))
    if threshold == 0.0 or steps == 1:
        assert completion.forwards == 1 + 3, "prefill and one pass per block: commits ride along"
    elif threshold == 1.0 and steps >= 4:
        assert completion.forwards == 1 + 10, "one token per pass"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "length", "seed"), [(4, 0, 0), (4, 5, 1), (8, 11, 2), (1, 2, 3)])
def test_sampling_with_a_seed_decodes_like_the_oracle(family: str, size: int, length: int, seed: int) -> None:
    rules = DecodeRules(block_size=size, threshold=0.5, steps=size, temperature=0.9, top_k=20, top_p=0.95, seed=seed)
    sampled = same_tokens(MODELS[family], prompt_of(length, 11), rules)
    greedy, _ = decode(MODELS[family], prompt_of(length, 11), replace(rules, temperature=0.0))
    other, _ = decode(MODELS[family], prompt_of(length, 11), replace(rules, seed=seed + 10))
    assert len({sampled.ids, greedy.ids, other.ids}) == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_an_end_anywhere_cuts_the_same_text(family: str, threshold: float) -> None:
    """Every token of an endless completion in turn becomes the end: it may be decided early, but stops only in its turn."""
    model, rules = MODELS[family], DecodeRules(block_size=8, threshold=threshold, steps=8)
    endless, events = decode(model, prompt_of(5, 17), rules)
    assert endless.finish_reason == "length"
    out_of_turn = False
    for token in sorted(set(endless.ids)):
        found = same_tokens(model, prompt_of(5, 17, token), rules)
        assert found.ids == endless.ids[: endless.ids.index(token) + 1]
        assert found.finish_reason == "stop"
        assert found.forwards <= endless.forwards
        for step in events:
            places = [i for i, (t, yes) in enumerate(zip(step.tokens, step.accepted, strict=True)) if yes and t == token]
            out_of_turn |= any(None in step.tokens[:i] for i in places)
    assert out_of_turn, "no end was ever decided with a mask to its left: this test has lost its point"


def test_the_first_of_several_ends_counts() -> None:
    model, rules = MODELS["llama"], DecodeRules(block_size=4, threshold=0.3, steps=4)
    endless = decode(model, prompt_of(2, 16), rules)[0].ids
    ends = (endless[9], endless[5], endless[13])
    first = min(endless.index(token) for token in ends)
    assert same_tokens(model, prompt_of(2, 16, *ends), rules).ids == endless[: first + 1]


def test_a_stop_saves_the_rest_of_the_block() -> None:
    model, rules = MODELS["llama"], DecodeRules(block_size=8, threshold=1.0, steps=8)
    endless, events = decode(model, prompt_of(3, 20), rules)
    stops = {t: decode(model, prompt_of(3, 20, t), rules)[0].forwards for t in set(endless.ids)}
    passes_of_blocks = {sum(step.start <= start for step in events) for start in (0, 8, 16)}
    assert min(stops.values()) < len(events)
    assert set(stops.values()) - passes_of_blocks, "some stop fell inside a block"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_a_budget_inside_a_block_cuts_without_changing_a_token(max_new_tokens: int) -> None:
    model, rules = MODELS["qwen2"], DecodeRules(block_size=4, threshold=0.5, steps=4)
    whole, _ = decode(model, prompt_of(5, 7), rules)
    found = same_tokens(model, prompt_of(5, max_new_tokens), rules)
    assert found.ids == whole.ids[:max_new_tokens]
    assert found.finish_reason == "length"


def test_an_end_beyond_the_budget_is_no_stop() -> None:
    model, rules = MODELS["llama"], DecodeRules(block_size=8, threshold=1.0, steps=8)
    whole = decode(model, prompt_of(2, 6), rules)[0].ids
    late = next(i for i in range(1, 6) if whole[i] not in whole[:i])
    found = same_tokens(model, prompt_of(2, late, whole[late]), rules)
    assert (found.ids, found.finish_reason) == (whole[:late], "length")


@pytest.mark.parametrize("length", [3, 4, 6, 9])
def test_ends_and_masks_in_the_prompt_are_ordinary_tokens(length: int) -> None:
    model, rules = MODELS["qwen3"], DecodeRules(block_size=4, threshold=0.4, steps=4)
    end = 11
    clean = prompt_of(length, 10)
    odd = Prompt((MASK, *clean.ids[1:-2], end, MASK), 10, frozenset([end]))
    found = same_tokens(model, odd, rules)
    endless, events = decode(model, replace(odd, eos_ids=frozenset()), rules)
    cut = endless.ids.index(end) + 1 if end in endless.ids else len(endless.ids)
    assert found.ids == endless.ids[:cut]
    for step in events:
        assert not any(step.accepted[: step.fixed])
    assert endless.ids != decode(model, clean, rules)[0].ids


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_keys_and_values_are_those_of_the_finished_text(family: str) -> None:
    """The fused commit must not keep what was computed while the block still held masks."""
    model, prompt = MODELS[family], prompt_of(6, 14)
    decoder = BlockwiseDecoder(model, prompt, DecodeRules(block_size=4, threshold=0.3, steps=4), MASK)
    with torch.inference_mode():
        text = prompt.ids + decoder.run().ids
        length = decoder.cache.length
        assert length == 16, "all but the last block are committed"
        fresh = KVCache(model.config, length, dtype=torch.float32)
        mask = block_causal_mask(length, length, 4)
        model(torch.tensor(text[:length])[None], torch.arange(length)[None], fresh.attend(mask))
        fresh.commit(length)
        nothing = torch.empty(1, model.config.num_kv_heads, 0, model.config.head_dim)
        for layer in range(model.config.num_layers):
            for kept, expected in zip(
                decoder.cache.extend(layer, nothing, nothing), fresh.extend(layer, nothing, nothing), strict=True
            ):
                assert kept.shape[2] == length
                torch.testing.assert_close(kept, expected, atol=1e-4, rtol=1e-4)


def test_decoding_leaves_no_state_behind() -> None:
    model, rules = MODELS["llada2"], DecodeRules(block_size=4, threshold=0.5, steps=4)
    first = generate_blockwise(model, prompt_of(7, 9), rules, MASK)
    generate_blockwise(model, prompt_of(3, 12), rules, MASK)
    assert generate_blockwise(model, prompt_of(7, 9), rules, MASK) == first


@pytest.mark.parametrize("generate", [generate_blockwise, generate_reference])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt((1, 2), 0, frozenset()), "max_new_tokens is 0"),
        (Prompt((1, VOCAB), 4, frozenset()), f"prompt token {VOCAB} is outside"),
        (Prompt((1,) * 125, 4, frozenset()), "exceeds the context of 128"),
    ],
)
def test_requests_are_checked_before_any_forward(generate: object, prompt: Prompt, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generate(MODELS["llama"], prompt, DecodeRules(block_size=4), MASK)  # type: ignore[operator]
