"""Denoising one request through the engine against the oracle without a cache: the same tokens, in no more forwards.

Other settings, batches, cache blocks and preemptions are the conformance suite's (`tests/conformance`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from tiny import FAMILIES, MASK, prompt_of, tiny_model, with_params
from unmask.engine.engine import Engine
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.models.arch.transformer import Transformer

MODELS = {family: tiny_model(family, 1) for family in FAMILIES}
THRESHOLDS = (0.0, 0.3, 0.95, 1.0)


def decode(model: Transformer, request: Request) -> tuple[Completion, list[DecodingStep]]:
    """Cached decoding, with what it reported; the model's calls are counted from outside."""
    calls: list[int] = []
    counter = model.register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model, mask_id=MASK, prefix_cache=False)
    updates = list(engine.stream(request, watch=True))
    counter.remove()
    engine.pool.check()
    assert engine.pool.num_used == 0
    completion = updates[-1].completion
    assert completion is not None
    assert sum((update.new_ids for update in updates), ()) == completion.ids
    steps = [update.step for update in updates if update.step is not None]
    if not request.params.editing:
        check_steps(request, completion, steps, len(calls))
    return completion, steps


def check_steps(request: Request, completion: Completion, steps: list[DecodingStep], calls: int) -> None:
    """The events, replayed, give the completion; every forward is a denoising step, the first one prefills as well."""
    size, length = request.params.block_size, len(request.ids)
    assert [step.forwards for step in steps] == list(range(1, len(steps) + 1))
    assert completion.forwards == calls == len(steps)
    canvas: dict[int, int | None] = {}
    for step in steps:
        assert step.start % size == 0
        num_fixed = sum(step.fixed)
        assert step.fixed == tuple(i < max(0, length - step.start) for i in range(size))
        assert step.tokens[:num_fixed] == request.ids[step.start :]
        before = [canvas.get(step.start + i) for i in range(size)]
        assert not any(step.edited)
        for i in range(size):
            if i < num_fixed or before[i] is not None:
                assert (step.guess[i], step.accepted[i], step.confidence[i]) == (None, False, 0.0)
                assert before[i] in (None, step.tokens[i]), "a decided token changed"
            else:
                assert step.guess[i] is not None
                assert step.guess[i] != MASK
                assert 0.0 < step.confidence[i] <= 1.0
                assert step.tokens[i] == (step.guess[i] if step.accepted[i] else None)
                if request.params.policy == "threshold":
                    assert step.accepted[i] or step.confidence[i] <= request.params.threshold
        assert any(step.accepted)
        canvas |= {step.start + i: token for i, token in enumerate(step.tokens)}
    new = [canvas[i] for i in range(length, max(canvas) + 1)]
    assert completion.ids == tuple(new[: len(completion.ids)])
    if completion.finish_reason == "length":
        assert len(completion.ids) == request.params.max_new_tokens
        assert None not in completion.ids, "only what lies beyond the budget may be left undecided"
        assert not request.eos_ids.intersection(completion.ids)
    else:
        assert request.eos_ids.intersection(completion.ids) == {completion.ids[-1]}
        assert len(completion.ids) <= request.params.max_new_tokens


def same_tokens(model: Transformer, request: Request) -> Completion:
    """Decode both ways: the same ids, the same reason, no more forwards."""
    completion, _ = decode(model, request)
    check_oracle(completion, model, request)
    return completion


def check_oracle(completion: Completion, model: Transformer, request: Request) -> None:
    """Ids and finish reason are the oracle's, in no more forwards."""
    oracle = generate_reference(model, request, MASK)
    assert (completion.ids, completion.finish_reason) == (oracle.ids, oracle.finish_reason), f"{request}"
    assert completion.forwards <= oracle.forwards


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_every_prompt_length_decodes_like_the_oracle(family: str, size: int) -> None:
    """All lengths modulo the block, none and several full blocks included; thresholds and steps take turns."""
    choices = list(product(THRESHOLDS, sorted({1, min(2, size), size})))
    used = 0
    for length in (*range(size + 1), 2 * size + size // 2):
        for _ in range(1 if size == 8 else 2):
            threshold, steps = choices[used % len(choices)]
            used += 1
            rules = ResolvedParams(block_size=size, threshold=threshold, steps=steps)
            same_tokens(MODELS[family], prompt_of(length, size + size // 2 + 1, rules=rules))
    assert used >= min(len(choices), 10)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_every_threshold_and_step_count(threshold: float, steps: int) -> None:
    rules = ResolvedParams(block_size=4, threshold=threshold, steps=steps)
    completion = same_tokens(MODELS["qwen3"], prompt_of(6, 10, rules=rules))
    if threshold == 0.0 or steps == 1:
        assert completion.forwards <= 3, "one pass per block: prefill and commits ride along"
    elif threshold == 1.0 and steps >= 4:
        assert completion.forwards == len(completion.ids), "one token per pass"


def test_a_prefill_that_does_not_fit_comes_first() -> None:
    model, rules = MODELS["qwen3"], ResolvedParams(block_size=4, threshold=0.5, steps=4)
    request = prompt_of(19, 6, rules=rules)
    whole, steps = decode(model, request)
    for max_num_batched_tokens in (24, 19, 8, 7, 4):
        engine = Engine(model, mask_id=MASK, max_num_batched_tokens=max_num_batched_tokens, prefix_cache=False)
        updates = list(engine.stream(request, watch=True))
        found = updates[-1].completion
        assert found is not None
        assert found.ids == whole.ids
        chunks = 0 if max_num_batched_tokens >= 20 else -(-16 // (max_num_batched_tokens // 4 * 4))
        commits = 2 if max_num_batched_tokens < 8 else 0  # two blocks no longer fit one forward: a commit takes its own
        assert chunks <= found.costs.prefill_forwards <= chunks + commits, max_num_batched_tokens
        assert found.forwards == len(updates) == len(steps) + found.costs.prefill_forwards
        assert [u.step is None for u in updates].count(True) == found.costs.prefill_forwards


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "length", "seed"), [(4, 0, 0), (4, 5, 1), (8, 11, 2), (1, 2, 3)])
def test_sampling_with_a_seed_decodes_like_the_oracle(family: str, size: int, length: int, seed: int) -> None:
    rules = ResolvedParams(block_size=size, threshold=0.5, steps=size, temperature=0.9, top_k=20, top_p=0.95, seed=seed)
    sampled = same_tokens(MODELS[family], prompt_of(length, 11, rules=rules))
    greedy, _ = decode(MODELS[family], prompt_of(length, 11, rules=rules.replace(temperature=0.0)))
    other, _ = decode(MODELS[family], prompt_of(length, 11, rules=rules.replace(seed=seed + 10)))
    assert len({sampled.ids, greedy.ids, other.ids}) == 3


@pytest.mark.parametrize(("family", "threshold"), [("llama", 0.5), ("llada2", 0.5), ("qwen2", 1.0)])
def test_an_end_anywhere_cuts_the_same_text(family: str, threshold: float) -> None:
    """Every token of an endless completion in turn becomes the end: it may be decided early, but stops only in its turn."""
    model, rules = MODELS[family], ResolvedParams(block_size=8, threshold=threshold, steps=8)
    endless, events = decode(model, prompt_of(5, 17, rules=rules))
    assert endless.finish_reason == "length"
    out_of_turn = False
    for token in sorted(set(endless.ids)):
        found = same_tokens(model, prompt_of(5, 17, token, rules=rules))
        assert found.ids == endless.ids[: endless.ids.index(token) + 1]
        assert found.finish_reason == "stop"
        assert found.forwards <= endless.forwards
        for step in events:
            places = [i for i, (t, yes) in enumerate(zip(step.tokens, step.accepted, strict=True)) if yes and t == token]
            out_of_turn |= any(None in step.tokens[:i] for i in places)
    assert out_of_turn, "no end was ever decided with a mask to its left: this test has lost its point"


def test_the_first_of_several_ends_counts() -> None:
    model, rules = MODELS["llama"], ResolvedParams(block_size=4, threshold=0.3, steps=4)
    endless = decode(model, prompt_of(2, 16, rules=rules))[0].ids
    ends = (endless[9], endless[5], endless[13])
    first = min(endless.index(token) for token in ends)
    assert same_tokens(model, prompt_of(2, 16, *ends, rules=rules)).ids == endless[: first + 1]


def test_an_end_saves_the_rest_of_the_block() -> None:
    model, rules = MODELS["llama"], ResolvedParams(block_size=8, threshold=1.0, steps=8)
    endless, events = decode(model, prompt_of(3, 20, rules=rules))
    stops = {t: decode(model, prompt_of(3, 20, t, rules=rules))[0].forwards for t in set(endless.ids)}
    passes_of_blocks = {sum(step.start <= start for step in events) for start in (0, 8, 16)}
    assert min(stops.values()) < len(events)
    assert set(stops.values()) - passes_of_blocks, "some stop fell inside a block"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_a_budget_inside_a_block_cuts_without_changing_a_token(max_new_tokens: int) -> None:
    model, rules = MODELS["qwen2"], ResolvedParams(block_size=4, threshold=0.5, steps=4)
    whole, _ = decode(model, prompt_of(5, 7, rules=rules))
    found = same_tokens(model, prompt_of(5, max_new_tokens, rules=rules))
    assert found.ids == whole.ids[:max_new_tokens]
    assert found.finish_reason == "length"


def test_an_end_beyond_the_budget_is_no_stop() -> None:
    model, rules = MODELS["llama"], ResolvedParams(block_size=8, threshold=1.0, steps=8)
    whole = decode(model, prompt_of(2, 6, rules=rules))[0].ids
    late = next(i for i in range(1, 6) if whole[i] not in whole[:i])
    found = same_tokens(model, prompt_of(2, late, whole[late], rules=rules))
    assert (found.ids, found.finish_reason) == (whole[:late], "length")


@pytest.mark.parametrize("length", [3, 4, 6, 9])
def test_ends_and_masks_in_the_prompt_are_ordinary_tokens(length: int) -> None:
    model, rules = MODELS["qwen3"], ResolvedParams(block_size=4, threshold=0.4, steps=4)
    end = 11
    clean = prompt_of(length, 10, rules=rules)
    odd = replace(clean, ids=(MASK, *clean.ids[1:-2], end, MASK), eos_ids=frozenset([end]))
    found = same_tokens(model, odd)
    endless, events = decode(model, replace(odd, eos_ids=frozenset()))
    cut = endless.ids.index(end) + 1 if end in endless.ids else len(endless.ids)
    assert found.ids == endless.ids[:cut]
    for step in events:
        assert not any(accepted for accepted, fixed in zip(step.accepted, step.fixed, strict=True) if fixed)
    assert endless.ids != decode(model, clean)[0].ids


EDITING = (
    {"edit_threshold": 0.0, "max_post_steps": 3},
    {"edit_threshold": 0.4, "max_post_steps": 16},
    {"edit_threshold": 0.0, "max_post_steps": 0},
    {"edit_threshold": 0.2, "max_post_steps": 4, "window": 2},
    {"edit_threshold": 0.0, "max_post_steps": 2, "window": 3},
)


@pytest.mark.parametrize("family", ["llama", "llada2"])
@pytest.mark.parametrize("changes", EDITING, ids=str)
def test_editing_decodes_like_the_oracle(family: str, changes: dict[str, Any]) -> None:
    model, rules = MODELS[family], ResolvedParams(block_size=4, threshold=0.3, steps=4, **changes)
    request = prompt_of(6, 11, rules=rules)
    request = replace(request, ids=(*request.ids[:1], None, *request.ids[2:]))
    found = same_tokens(model, request)
    _, steps = decode(model, request)
    edited = [step for step in steps if any(step.edited)]
    assert edited, "no edit was ever made: this test has lost its point"
    assert found.costs.edits == sum(sum(step.edited) for step in steps)
    canvas = {p: token for p, token in enumerate(request.ids) if token is not None}
    for step in steps:
        assert (len(step.tokens) <= 4 * rules.window) & (len(step.tokens) % 4 == 0)
        for i, token in enumerate(step.tokens):
            position = step.start + i
            assert token != MASK
            if step.fixed[i]:
                assert (token, step.edited[i], step.accepted[i]) == (request.ids[position], False, False)
            elif step.edited[i]:
                assert canvas[position] != token
                assert step.confidence[i] > (rules.edit_threshold or 0.0)
            elif position in canvas:
                assert canvas[position] == token
            if token is not None:
                canvas[position] = token
    assert found.ids == tuple(canvas[p] for p in (1, *range(6, 17)))
    if rules.max_post_steps:
        assert found.ids != generate_reference(model, with_params(request, edit_threshold=None, window=1), MASK).ids


def test_a_block_ends_with_a_pass_that_edits_nothing() -> None:
    """That pass is the commit: editing costs a forward a block when nothing is edited."""
    model, rules = MODELS["qwen3"], ResolvedParams(block_size=4, threshold=0.5, steps=4)
    plain = same_tokens(model, prompt_of(6, 10, rules=rules))
    edited = same_tokens(model, prompt_of(6, 10, rules=rules.replace(edit_threshold=1.0)))
    assert edited.ids == plain.ids
    assert plain.forwards < edited.forwards <= plain.forwards + 3
    hasty = same_tokens(model, prompt_of(6, 10, rules=rules.replace(edit_threshold=1.0, max_post_steps=0)))
    assert hasty.forwards == plain.forwards


def test_post_steps_are_limited() -> None:
    """A model that changes its mind in every pass ends all the same."""
    model = MODELS["llama"]
    forwards = []
    for limit in (0, 1, 2, 5):
        rules = ResolvedParams(block_size=8, threshold=0.0, steps=8, edit_threshold=0.0, max_post_steps=limit)
        found, steps = decode(model, prompt_of(3, 5, rules=rules))
        assert found.forwards <= 1 + limit
        assert all(any(step.edited) for step in steps[1:-1])
        forwards.append(found.forwards)
    assert forwards == sorted(forwards)
    assert forwards[0] < forwards[1]


@pytest.mark.parametrize("window", [1, 2])
def test_edited_tokens_are_streamed_once_they_are_final(window: int) -> None:
    model = MODELS["llama"]
    rules = ResolvedParams(block_size=4, threshold=0.3, steps=4, edit_threshold=0.1, max_post_steps=3, window=window)
    engine = Engine(model, mask_id=MASK)
    request, out = prompt_of(5, 17, rules=rules), list[int]()
    for update in engine.stream(request, watch=True):
        out += update.new_ids
        assert update.step is not None
        if update.completion is None:
            assert 5 + len(out) <= update.step.start + 4 * window
    expected = generate_reference(model, request, MASK).ids
    assert tuple(out) == expected, "no streamed token was edited afterwards"


@pytest.mark.parametrize("policy", [{"policy": "entropy", "entropy_bound": 0.5}, {"policy": "fixed"}], ids=["entropy", "fixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_policies_decode_like_the_oracle(family: str, policy: dict[str, Any]) -> None:
    rules = ResolvedParams(block_size=8, steps=5, **policy)
    found = same_tokens(MODELS[family], prompt_of(5, 11, rules=rules))
    if rules.policy == "fixed":
        assert found.forwards <= 2 * 5, "two blocks of five steps"


HOLES = ((None, 3, 4), (3, None, 4, 5, None, None, 9, 9, 9, 9), (3, 4, 5, 6, None, 7), (None,) * 5, (1, 2, 3, None))


@pytest.mark.parametrize("ids", HOLES, ids=str)
@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_holes_are_filled_in_place(ids: tuple[int | None, ...], max_new_tokens: int) -> None:
    model, rules = MODELS["qwen2"], ResolvedParams(block_size=4, threshold=0.4, steps=4)
    request = Request(ids, rules.replace(max_new_tokens=max_new_tokens))
    found, steps = completion_and_steps(model, request)
    check_oracle(found, model, request)
    assert len(found.ids) == request.num_wanted
    assert MASK not in found.ids
    for step in steps:
        assert step.fixed == tuple(p < len(ids) and ids[p] is not None for p in range(step.start, step.start + 4))
        given = tuple(t for t, fixed in zip(step.tokens, step.fixed, strict=True) if fixed)
        assert given == tuple(t for t in ids[step.start : step.start + 4] if t is not None)


def completion_and_steps(model: Transformer, request: Request) -> tuple[Completion, list[DecodingStep]]:
    updates = list(Engine(model, mask_id=MASK, prefix_cache=False).stream(request, watch=True))
    completion = updates[-1].completion
    assert completion is not None
    return completion, [update.step for update in updates if update.step is not None]


def test_a_hole_is_never_filled_with_an_end() -> None:
    model, rules = MODELS["llama"], ResolvedParams(block_size=4, threshold=0.4, steps=4)
    ids = (5, None, None, 8, None, 9)
    free = generate_reference(model, Request(ids, rules.replace(max_new_tokens=4)), MASK).ids
    request = Request(ids, rules.replace(max_new_tokens=4), frozenset(free[:3]))
    found = completion_and_steps(model, request)[0]
    check_oracle(found, model, request)
    assert not request.eos_ids & set(found.ids[:3])


@pytest.mark.parametrize("least", [0, 1, 6, 9])
def test_no_end_comes_before_the_least_length(least: int) -> None:
    model, rules = MODELS["llama"], ResolvedParams(block_size=4, threshold=0.3, steps=4)
    endless = decode(model, prompt_of(2, 9, rules=rules))[0].ids
    ends = frozenset([endless[0], endless[4]])
    found = same_tokens(model, replace(with_params(prompt_of(2, 9, rules=rules), min_new_tokens=least), eos_ids=ends))
    assert not ends & set(found.ids[:least])
    assert len(found.ids) >= max(least, 1)


def test_bias_bans_and_favours() -> None:
    model, rules = MODELS["qwen3"], ResolvedParams(block_size=4, threshold=0.3, steps=4)
    free = decode(model, prompt_of(5, 9, rules=rules))[0].ids
    banned = {token: float("-inf") for token in set(free)}
    found = same_tokens(model, with_params(prompt_of(5, 9, rules=rules), logit_bias=banned))
    assert not set(free) & set(found.ids)
    favoured = same_tokens(model, with_params(prompt_of(5, 9, rules=rules), logit_bias={11: 1e4, MASK: 1e9}))
    assert favoured.ids == (11,) * 9, "not even a bias brings the mask token"


def test_decoding_leaves_no_state_behind() -> None:
    model, rules = MODELS["llada2"], ResolvedParams(block_size=4, threshold=0.5, steps=4)
    engine = Engine(model, mask_id=MASK, prefix_cache=False)
    first = engine.run([prompt_of(7, 9, rules=rules)])
    engine.run([prompt_of(3, 12, rules=rules)])
    assert engine.run([prompt_of(7, 9, rules=rules)]) == first


@pytest.mark.parametrize("length", [18, 19])
def test_a_filled_hole_ends_the_request_though_older_blocks_may_be_edited(length: int) -> None:
    """With whole blocks of given tokens behind the hole, too: 18 tokens leave nothing undecided behind it."""
    ids = [*prompt_of(length, 1, rules=ResolvedParams()).ids]
    ids[12] = None
    rules = ResolvedParams(block_size=3, steps=2, threshold=0.0, edit_threshold=0.1, max_post_steps=3, window=2)
    request = Request(tuple(ids), rules.replace(max_new_tokens=0), frozenset())
    completion, _ = decode(MODELS["llama"], request)
    check_oracle(completion, MODELS["llama"], request)
    assert len(completion.ids) == 1
