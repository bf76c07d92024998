"""Whatever the engine does to be fast, its steps are the oracle's: properties over random requests, in float64.

That literal special tokens in text stay text is the tokenizer's matter: `tests/data/test_tokenizer.py`.

Legend: L layers, G kv heads, T positions, S head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.adapter import check_clean
from conformance.models import KINDS, golden_model
from tiny import MASK, tiny_model
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.engine import Engine
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer

EDITING = (
    {"edit_threshold": 0.0, "max_post_steps": 2},
    {"edit_threshold": 0.3, "max_post_steps": 4},
    {"edit_threshold": 0.1, "max_post_steps": 3, "window": 2},
)
CHOOSING: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"policy": "entropy", "entropy_bound": 1.0},
    {"policy": "fixed"},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.3},
)
PENALTIES: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
)
TOKENS = st.integers(0, MASK - 1)
# Few prefixes, so that requests share them.
STEM = (5, 17, 3, 40, 8, 22, 9, 31, 2, 50, 44, 13, 28, 1, 19, 33, 25, 6)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """The first token is given: among nothing but masks all positions are alike, and rounding would break the tie."""
    ids: list[int | None] = [*STEM[: draw(st.integers(1, len(STEM)))], *draw(st.lists(TOKENS | st.just(MASK), max_size=6))]
    for hole in draw(st.lists(st.integers(1, 23), max_size=3)):
        if hole < len(ids):
            ids[hole] = None
    size = draw(st.sampled_from([1, 2, 3, 4, 4, 8, 8]))
    editing = draw(st.sampled_from([{}, {}, *EDITING]))
    rules = ResolvedParams(
        block_size=size,
        steps=draw(st.sampled_from([1, 2, size, size + 1])),
        threshold=draw(st.sampled_from([0.0, 0.3, 0.6, 0.95])),
        seed=draw(st.integers(0, 3)),
        **draw(st.sampled_from(CHOOSING)),
        **draw(st.sampled_from(PENALTIES)),
        **editing,
    )
    least = 0 if None in ids else 1
    budget = draw(st.integers(least, 14))
    return Request(
        tuple(ids),
        rules.replace(
            max_new_tokens=budget,
            min_new_tokens=draw(st.sampled_from([0, 0, budget // 2])),
            logit_bias=draw(st.sampled_from([{}, {}, {3: float("-inf"), 30: 2.0}, {MASK: 5.0}])),
        ),
        draw(st.frozensets(TOKENS, max_size=6)),
        sample=draw(st.integers(0, 1)),
        trace=True,
    )


Batch = st.lists(requests(), min_size=1, max_size=4)


def oracle(model: Transformer, request: Request) -> tuple[Completion, list[DecodingStep]]:
    steps: list[DecodingStep] = []
    return generate_reference(model, request, MASK, steps.append), steps


def decisions(steps: Sequence[DecodingStep]) -> list[object]:
    return [(step.start, step.fixed, step.tokens, step.guess, step.accepted, step.edited) for step in steps]


class Capture:
    """Plain attention that keeps the keys and values of every layer, [G, T, S]."""

    def __init__(self, mask_TT: Tensor) -> None:
        self.attend, self.keys_and_values = DenseAttend(mask_TT[None]), list[tuple[Tensor, Tensor]]()

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        self.keys_and_values.append((k_BGTS[0], v_BGTS[0]))
        return self.attend(layer, q_BHTS, k_BGTS, v_BGTS)


class Published:
    """What every published cache block should hold, noted when it is published."""

    def __init__(self, engine: Engine, model: Transformer) -> None:
        self.engine, self.model = engine, model
        self.content: dict[int, tuple[tuple[int, ...], int, int]] = {}
        self.publish = engine.scheduler.publish
        engine.scheduler.publish = self.note  # type: ignore[method-assign]

    def note(self, sequence: Any) -> None:
        before = sequence.num_published
        self.publish(sequence)
        for index in range(before, sequence.num_published):
            cache_block = sequence.block_table[index]
            if self.engine.pool.is_published(cache_block):
                size = sequence.block_size
                end = -(-(index + 1) * self.engine.cache_block_size // size) * size
                self.content[cache_block] = (tuple(sequence.tokens[:end]), size, index)

    @torch.inference_mode()
    def check(self) -> int:
        """Every cache block holds what a fresh forward over the final tokens gives; how many there are."""
        pool, cache_block_size = self.engine.pool, self.engine.cache_block_size
        cache_blocks = [cache_block for cache_block in range(pool.num_cache_blocks) if pool.is_published(cache_block)]
        kv_cache = self.engine.runner.kv_cache
        for cache_block in cache_blocks:
            tokens, size, index = self.content[cache_block]
            length = len(tokens)
            context = length if self.model.config.shifted else 0
            capture = Capture(block_causal_mask(length, length, size, context=context))
            read = self.model.config.inputs(tokens, 0, length)
            self.model(torch.tensor(read)[None], torch.arange(length)[None], capture)
            at = slice(index * cache_block_size, (index + 1) * cache_block_size)
            for layer, layer_cache in enumerate(capture.keys_and_values):
                expected = torch.stack([x[:, at].transpose(0, 1) for x in layer_cache])
                torch.testing.assert_close(kv_cache[layer, :, cache_block], expected, atol=1e-9, rtol=1e-9)
        return len(cache_blocks)


def serve(engine: Engine, batch: Sequence[Request], gaps: Sequence[int] = ()) -> list[Completion]:
    """Add the requests, some of them `gaps` steps after the one before, and run all to the end."""
    numbers, done = [], dict[int, Completion]()

    def step() -> None:
        for update in engine.step():
            if update.completion is not None:
                done[update.number] = update.completion

    for index, request in enumerate(batch):
        numbers.append(engine.add(request))
        for _ in range(gaps[index] if index < len(gaps) else 0):
            step()
    while engine.has_work:
        step()
    return [done[number] for number in numbers]


def assert_exact(family: str, batch: Sequence[Request], gaps: Sequence[int] = (), rounds: int = 1, **options: Any) -> None:
    """Served together, each request takes the oracle's steps; afterwards the cache is clean and right."""
    model = golden_model(family)
    prefill_chunk = options.pop("prefill_chunk", None)
    engine = Engine(model, mask_id=MASK, **{"num_tokens": 512, **options})
    engine.scheduler.prefill_chunk = prefill_chunk or engine.scheduler.prefill_chunk
    published = Published(engine, model)
    expected = [oracle(model, request) for request in batch]
    for _ in range(rounds):
        for found, (completion, steps) in zip(serve(engine, batch, gaps), expected, strict=True):
            assert (found.ids, found.finish_reason) == (completion.ids, completion.finish_reason)
            assert decisions(found.trace) == decisions(steps)
            assert MASK not in found.ids
            assert found.forwards == len(steps) + found.costs.prefill_forwards
        check_clean(engine)
    published.check()


FAMILY = st.sampled_from(KINDS)
CACHE_BLOCK_SIZE = st.sampled_from([1, 2, 3, 4, 6, 8, 16])
few = settings(max_examples=8)


@few
@given(FAMILY, requests())
def test_cached_equals_uncached(family: str, request: Request) -> None:
    """In no more forwards than the oracle."""
    model = golden_model(family)
    engine = Engine(model, mask_id=MASK, num_tokens=128, prefix_cache=False)
    completion, steps = oracle(model, request)
    (found,) = engine.run([request])
    assert (found.ids, found.finish_reason) == (completion.ids, completion.finish_reason)
    assert found.forwards <= completion.forwards, "prefill and commits ride along"
    assert decisions(found.trace) == decisions(steps)
    check_clean(engine)


@few
@given(FAMILY, Batch, st.lists(st.integers(0, 4), max_size=4), st.integers(1, 4))
def test_batched_equals_alone(family: str, batch: list[Request], gaps: list[int], max_num_seqs: int) -> None:
    """Whoever the neighbours are, and whenever they come."""
    assert_exact(family, batch, gaps, max_num_seqs=max_num_seqs, cache_block_size=8, prefix_cache=False)


@few
@given(FAMILY, Batch, st.integers(0, 2), CACHE_BLOCK_SIZE)
def test_preempted_equals_uninterrupted(family: str, batch: list[Request], slack: int, cache_block_size: int) -> None:
    """Cache blocks for the longest request and hardly more."""
    cache_blocks = -(-max(request.canvas_length for request in batch) // cache_block_size) + slack
    assert_exact(family, batch, cache_block_size=cache_block_size, num_tokens=cache_blocks * cache_block_size)


@few
@given(FAMILY, Batch, CACHE_BLOCK_SIZE, st.lists(st.integers(0, 6), max_size=4))
def test_prefix_cached_equals_cold(family: str, batch: list[Request], cache_block_size: int, gaps: list[int]) -> None:
    """Shared prompts, also with requests that run or have ended; cache blocks smaller and larger than blocks."""
    assert_exact(family, batch, gaps, rounds=2, cache_block_size=cache_block_size)


@few
@given(FAMILY, Batch, st.lists(st.integers(0, 4), max_size=4), st.integers(1, 6), CACHE_BLOCK_SIZE)
def test_prefill_in_parts_beside_others_equals_whole(
    family: str, batch: list[Request], gaps: list[int], prefill_chunk: int, cache_block_size: int
) -> None:
    """Also with holes in the prompt, and where the prefix cache gives a part of it."""
    assert_exact(family, batch, gaps, rounds=2, prefill_chunk=prefill_chunk, cache_block_size=cache_block_size)


@few
@given(FAMILY, Batch, st.integers(0, 9), CACHE_BLOCK_SIZE)
def test_chunked_prefill_equals_whole_and_separate_commits_fused_ones(
    family: str, batch: list[Request], spare: int, cache_block_size: int
) -> None:
    """With room for one window of blocks only, every commit and every block of the prompt takes a forward of its own."""
    least = max(request.params.window * request.params.block_size for request in batch)
    assert_exact(family, batch, max_num_batched_tokens=least + spare, cache_block_size=cache_block_size)


@few
@given(FAMILY, Batch, st.integers(0, 3), st.integers(0, 5), CACHE_BLOCK_SIZE, st.integers(1, 3))
def test_all_of_it_at_once(
    family: str, batch: list[Request], slack: int, spare: int, cache_block_size: int, max_num_seqs: int
) -> None:
    cache_blocks = -(-max(request.canvas_length for request in batch) // cache_block_size) + slack
    least = max(request.params.window * request.params.block_size for request in batch)
    batch = [replace(request, priority=index % 3 - 1) for index, request in enumerate(batch)]
    options = {
        "cache_block_size": cache_block_size,
        "num_tokens": cache_blocks * cache_block_size,
        "max_num_batched_tokens": least + spare,
        "max_num_seqs": max_num_seqs,
        "prefill_chunk": 1 + spare,
    }
    assert_exact(family, batch, (1, 0, 2), rounds=2, **options)


def a_batch(**rules: Any) -> list[Request]:
    """Six requests of unlike lengths with a common beginning."""
    made = ResolvedParams(**{"block_size": 4, "steps": 4, "threshold": 0.6, **rules})
    return [
        Request((*STEM[:n], n), made.replace(seed=n).replace(max_new_tokens=6 + n % 5), trace=True)
        for n in (4, 9, 12, 13, 16, 18)
    ]


def test_the_properties_are_not_about_nothing() -> None:
    """Interruptions, hits and chunks do happen, and cache blocks are published."""
    model, batch = golden_model("qwen3"), a_batch()
    tight = Engine(model, mask_id=MASK, cache_block_size=4, num_tokens=64)
    assert sum(completion.costs.preemptions for completion in tight.run(batch)) >= 2
    cached = Engine(model, mask_id=MASK, cache_block_size=4, num_tokens=512)
    published = Published(cached, model)
    cold = serve(cached, batch, (9, 9, 9, 9, 9))
    warm = serve(cached, batch)
    cold_hits, warm_hits = ([completion.costs.cached_tokens for completion in each] for each in (cold, warm))
    assert cold_hits[0] == 0
    assert all(cold_hits[1:])
    assert all(0 < hits <= len(r.ids) and hits % 4 == 0 for r, hits in zip(batch, warm_hits, strict=True))
    assert sum(warm_hits) > sum(cold_hits)
    assert [completion.ids for completion in warm] == [completion.ids for completion in cold]
    assert published.check() >= 12
    chunked = Engine(model, mask_id=MASK, cache_block_size=4, max_num_batched_tokens=4, num_tokens=512, prefix_cache=False)
    assert all(
        completion.costs.prefill_forwards >= len(r.ids) // 4 for r, completion in zip(batch, chunked.run(batch), strict=True)
    )
    fused = Engine(model, mask_id=MASK, cache_block_size=4, num_tokens=512, prefix_cache=False).run(batch)
    assert all(completion.costs.prefill_forwards == 0 for completion in fused)


def test_a_stale_cache_would_be_noticed() -> None:
    model = golden_model("llama")
    engine = Engine(model, mask_id=MASK, cache_block_size=4, num_tokens=64)
    published = Published(engine, model)
    engine.run(a_batch()[:1])
    assert published.check() >= 2
    cache_block = min(published.content)
    engine.runner.kv_cache[1, 1, cache_block, 0, 0, 0] += 1e-6
    with pytest.raises(AssertionError):
        published.check()


@pytest.mark.parametrize("cache_block_size", [1, 4, 6])
def test_an_autoregressive_cache_holds_the_final_text_too(cache_block_size: int) -> None:
    model = tiny_model("llama", 2, torch.float64)
    engine = Engine(model, cache_block_size=cache_block_size, num_tokens=72, max_num_batched_tokens=16)
    published = Published(engine, model)
    alone = [Engine(model, prefix_cache=False).run([request])[0].ids for request in a_batch()]
    for _ in range(2):
        assert [completion.ids for completion in serve(engine, a_batch(), (2, 2))] == alone
    check_clean(engine)
    assert published.check() >= 5


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"cache_block_size": 3, "num_tokens": 60},
    {"cache_block_size": 4, "num_tokens": 64, "max_num_batched_tokens": 8, "max_num_seqs": 3},
    {"cache_block_size": 16, "prefix_cache": False, "num_tokens": 512},
)


@pytest.mark.parametrize(
    ("family", "rules"),
    [("llama", EDITING[1]), ("qwen2", {}), ("qwen3", CHOOSING[4]), ("llada2", {}), ("llama", EDITING[2])],
    ids=["editing", "threshold", "sampled", "experts", "window"],
)
def test_float32_gives_the_same_tokens(family: str, rules: dict[str, Any]) -> None:
    """A decisive model: rounding at another number of rows decides nothing."""
    model, batch = tiny_model(family, 1), a_batch(**rules)[1:5]
    expected = [generate_reference(model, request, MASK).ids for request in batch]
    for options in SETTINGS:
        engine = Engine(model, mask_id=MASK, **options)
        assert [completion.ids for completion in serve(engine, batch, (1, 2))] == expected, options
        check_clean(engine)


def test_seeds_are_reproducible_and_matter() -> None:
    """The same seed and sample give the same text in every setting; others do not."""
    model = golden_model("qwen2")
    base = replace(a_batch(temperature=1.0)[2], trace=False)
    drawn = [replace(base, sample=n, params=base.params.replace(seed=s)) for s in (0, 1) for n in (0, 1)]
    runs = {tuple(c.ids for c in serve(Engine(model, mask_id=MASK, **options), drawn)) for options in SETTINGS}
    assert len(runs) == 1
    assert len(set(runs.pop())) == 4
