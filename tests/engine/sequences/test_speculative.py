"""A sequence that drafts: what its forwards hold, what becomes of drafts, and its text, that of decoding token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import MASK, tiny_model
from unmask.diffusion.decode import Guess
from unmask.engine.costs import CostTable
from unmask.engine.draft_statistics import DraftStatistics
from unmask.engine.drafting import Draft, DraftPlan, DraftPrices
from unmask.engine.engine import Engine
from unmask.engine.request import Completion, Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.engine.sequences.base import ModelOutput, ScheduledSequence
from unmask.engine.sequences.speculative import SpeculativeSequence
from unmask.models.arch.transformer import Transformer

START = 1
FREE = DraftPrices(0.0, 0.0, 0.0, 0.0)
PROMPT = (5, 17, 3, 40, 8)


def sequence_of(*, shifted: bool = True, prompt: tuple[int, ...] = PROMPT, **options: Any) -> SpeculativeSequence:
    params = ResolvedParams(**{"block_size": 4, "steps": 4, "threshold": 0.0, "max_new_tokens": 20, **options})
    return SpeculativeSequence(Request(prompt, params), 0, MASK if shifted else None, 4, shifted=shifted)


def statistics_of(costs: CostTable) -> DraftStatistics:
    return DraftStatistics(costs=costs)


class Forwards:
    """Forwards of one sequence with made-up outputs."""

    def __init__(self, sequence: SpeculativeSequence) -> None:
        self.sequence = sequence

    def plans(self) -> list[DraftPlan]:
        return self.sequence.draft_options(FREE) if self.sequence.may_draft else []

    def pending(self) -> list[int]:
        """Tokens that masks have drafted and that still may be verified."""
        plans = [plan for plan in self.plans() if plan.drafts and plan.drafts[0].key[0] == "masks"]
        return [draft.token for draft in max((plan.drafts for plan in plans), key=len, default=())]

    def looked_up(self) -> list[int]:
        plans = [plan for plan in self.plans() if plan.drafts and plan.drafts[0].key[0] == "lookup"]
        return [draft.token for draft in max((plan.drafts for plan in plans), key=len, default=())]

    def __call__(self, tokens: list[int], *drafts: int, masks: int = 0, confidence: float = 0.9) -> ScheduledSequence:
        """Verify these drafts and run masks; `tokens` are what the forward predicts."""
        self.sequence.follow_plan(DraftPlan(tuple(Draft(d, 0.5, ("masks", 5, 1), 0.5) for d in drafts), masks))
        scheduled = self.sequence.schedule(64)
        assert scheduled is not None
        assert len(scheduled.queries) == len(tokens)
        self.sequence.apply(scheduled, ModelOutput(Guess(scheduled.queries, tokens, [confidence] * len(tokens))))
        return scheduled


def test_a_forward_verifies_drafts_and_drafts_on() -> None:
    sequence = sequence_of()
    forward = Forwards(sequence)
    scheduled = forward([10, 11, 12, 13], masks=3)
    assert (scheduled.start, scheduled.causal_end, scheduled.stop) == (0, 6, 9)
    assert sequence.tokens == [*PROMPT, 10]
    assert forward.pending() == [11, 12, 13]
    # Both drafts are accepted, and one token more is decided; the masks after them draft on.
    scheduled = forward([11, 12, 14, 15, 16], 11, 12, masks=2)
    assert (scheduled.start, scheduled.causal_end, scheduled.stop) == (6, 9, 11)
    assert sequence.tokens == [*PROMPT, 10, 11, 12, 14]
    assert forward.pending() == [15, 16]
    # The first one is not accepted: what masks drafted behind it is dropped.
    forward([20, 16, 21, 22], 15, 16, masks=1)
    assert sequence.tokens == [*PROMPT, 10, 11, 12, 14, 20]
    assert forward.pending() == []
    assert sequence.committed == len(sequence.tokens)


def test_drafts_that_are_not_verified_stay_while_the_text_agrees() -> None:
    sequence = sequence_of()
    forward = Forwards(sequence)
    forward([10, 11, 12, 13], masks=3)
    forward([11])
    assert forward.pending() == [12, 13]
    forward([12, 40], 12)
    assert forward.pending() == []


def test_without_a_plan_a_forward_is_that_of_decoding_token_by_token() -> None:
    for shifted in (True, False):
        sequence = sequence_of(shifted=shifted)
        forward = Forwards(sequence)
        forward([10])
        scheduled = forward([11])
        assert (scheduled.stop - scheduled.start, scheduled.queries) == (1, (6,))
        assert scheduled.causal_end == scheduled.stop, "no token is noisy"


def test_an_autoregressive_sequence_verifies_looked_up_drafts() -> None:
    sequence = sequence_of(shifted=False, prompt=(1, 2, 3, 4, 5, 6, 9, 1, 2))
    forward = Forwards(sequence)
    assert forward.looked_up()[:4] == [3, 4, 5, 6]
    scheduled = forward([3, 4, 7, 8], 3, 4, 5)
    assert (scheduled.start, scheduled.stop) == (0, 12)
    assert scheduled.logits_positions == (8, 9, 10, 11)
    assert scheduled.queries == (9, 10, 11, 12)
    assert sequence.tokens[9:] == [3, 4, 7]
    assert sequence.committed == 11
    assert forward.looked_up() == []
    assert all(not plan.num_masks for plan in forward.plans())


def test_a_text_that_went_on_unasked_is_looked_up_all_the_same() -> None:
    """While nobody asks for drafts, as in a large batch, a forward does nothing for them."""
    forward = Forwards(sequence_of())
    for token in (20, 21, 22, 23, 30, 20, 21):
        forward([token])
    assert forward.looked_up()[:3] == [22, 23, 30]
    forward([22])
    assert forward.looked_up()[:2] == [23, 30]


def test_drafts_end_with_the_text_and_with_the_room() -> None:
    sequence = sequence_of(max_new_tokens=4, stop_token_ids=(12,))
    forward = Forwards(sequence)
    forward([10, 11, 12, 13], masks=3)
    assert forward.pending() == [11, 12]
    possible = sequence.draft_options(FREE)
    assert max(len(plan.drafts) + plan.num_masks for plan in possible) == 2
    assert not any(plan.num_masks for plan in possible if len(plan.drafts) == 2), "nothing is drafted behind an end"


def test_a_threshold_of_the_request_is_a_least_confidence() -> None:
    forward = Forwards(sequence_of(threshold=0.8))
    forward([10, 11, 12, 13], masks=3, confidence=0.79)
    assert forward.pending() == []
    forward([10, 11, 12, 13], masks=3, confidence=0.81)
    assert forward.pending() == [11, 12, 13]


def test_masks_are_probed_seldom_while_they_are_not_worth_it() -> None:
    sequence = sequence_of(max_new_tokens=200)
    forward = Forwards(sequence)
    probed = []
    for number in range(100):
        sequence.follow_plan(DraftPlan())
        if wants := sequence.wants_probe:
            sequence.probe()
            probed.append(number)
        scheduled = sequence.schedule(64)
        assert scheduled is not None
        assert scheduled.stop - scheduled.causal_end == wants
        tokens = [number % 50, *[50] * wants]
        sequence.apply(scheduled, ModelOutput(Guess(scheduled.queries, tokens, [0.05] * len(tokens))))
    assert probed[0] == 0
    assert len(probed) <= 6
    forward([1, 2, 3], masks=2)
    assert not sequence.wants_probe


TABLES = (
    CostTable(),
    CostTable({1: 1.0, 2: 1.1, 8: 1.4, 16: 3.0}, noisy={0: 0.0, 1: 0.2, 8: 0.5}),
    CostTable({1: 1.0, 2: 1.6}),
)
MODELS = {kind: tiny_model("qwen3", 4, torch.float64) for kind in ("autoregressive", "shifted")}
MODELS["shifted"].config = replace(MODELS["shifted"].config, mask_id=MASK, block_size=4, start_id=START)


@st.composite
def repetitive_requests(draw: st.DrawFn) -> Request:
    """A prompt in which things come twice, of few tokens."""
    part = draw(st.lists(st.integers(2, 9), min_size=2, max_size=6))
    ids = (*part, *draw(st.lists(st.integers(2, 9), max_size=3)), *part[: draw(st.integers(1, len(part)))])
    params = ResolvedParams(
        block_size=draw(st.sampled_from([1, 2, 4, 8])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.8])),
        seed=draw(st.integers(0, 2)),
        threshold=draw(st.sampled_from([0.0, 0.3])),
        max_new_tokens=draw(st.integers(1, 18)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        logprobs=draw(st.sampled_from([None, 1])),
        logit_bias={MASK: float("-inf")},
    )
    return Request(ids, params, draw(st.frozensets(st.integers(2, 56), max_size=3)), sample=draw(st.integers(0, 1)))


def plain(request: Request, *, shifted: bool) -> Completion:
    """Token by token, alone."""
    request = replace(request, params=request.params.replace(prompt_lookup=False, block_size=1, mode="speculative"))
    (completion,) = Engine(MODELS["shifted" if shifted else "autoregressive"], prefix_cache=False).run([request])
    assert completion.costs.accepted_drafts == 0
    assert completion.forwards == len(completion.ids)
    return completion


@settings(max_examples=15)
@given(
    st.lists(repetitive_requests(), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(TABLES),
    st.sampled_from([{}, {"cache_block_size": 3, "num_tokens": 48}, {"max_num_batched_tokens": 9, "max_num_seqs": 2}]),
)
def test_the_text_is_that_of_decoding_token_by_token(
    batch: list[Request], shifted: bool, costs: CostTable, options: dict[str, Any]
) -> None:
    """For all costs, neighbours, chunks and interruptions, drawn or not; log-probabilities too."""
    model: Transformer = MODELS["shifted" if shifted else "autoregressive"]
    requests = [replace(each, params=each.params.replace(mode="speculative")) for each in batch]
    engine = Engine(model, drafting=statistics_of(costs), **options)
    for found, request in zip(engine.run(requests), requests, strict=True):
        expected = plain(request, shifted=shifted)
        assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
        assert found.forwards <= expected.forwards + found.costs.prefill_forwards
        if found.logprobs is not None and expected.logprobs is not None:
            pairs = zip(found.logprobs, expected.logprobs, strict=True)
            assert all(a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-9) for a, b in pairs)
    engine.pool.check()
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("shifted", [False, True])
def test_lookup_takes_fewer_forwards_where_the_text_repeats_itself(shifted: bool) -> None:
    """The tiny model loops."""
    ids, budget = (5, 17, 3, 40, 8, 22, 9, 31, 2), 60
    params = ResolvedParams(block_size=1, max_new_tokens=budget, mode="speculative", logit_bias={MASK: float("-inf")})
    request = Request(ids, params)
    model = MODELS["shifted" if shifted else "autoregressive"]
    (found,) = Engine(model, drafting=statistics_of(TABLES[1])).run([request])
    assert found.ids == plain(request, shifted=shifted).ids
    assert found.forwards < budget / 2
    assert found.costs.accepted_drafts == budget - found.forwards
    (without,) = Engine(model, drafting=statistics_of(TABLES[1])).run(
        [replace(request, params=params.replace(prompt_lookup=False))]
    )
    assert (without.ids, without.forwards) == (found.ids, budget)


def test_the_same_requests_take_the_same_forwards_where_costs_are_given() -> None:
    params = ResolvedParams(block_size=8, threshold=0.0, mode="speculative", max_new_tokens=40)
    requests = [Request(PROMPT[:n], params, trace=True) for n in (2, 3, 5)]
    first, second = (Engine(MODELS["shifted"], drafting=statistics_of(TABLES[1])).run(requests) for _ in range(2))
    assert first == second
    assert [each.trace for each in first] == [each.trace for each in second]


def test_what_does_not_pay_is_not_done() -> None:
    """Where each token more costs as much as a forward, nothing is drafted, and no mask is run to see whether it would pay."""
    params = ResolvedParams(block_size=8, threshold=0.0, mode="speculative", max_new_tokens=100)
    counts: list[int] = []
    model = MODELS["shifted"]
    counter = model.register_forward_pre_hook(lambda _, arguments: counts.append(arguments[0].shape[1]))
    Engine(model, drafting=DraftStatistics(costs=CostTable({1: 1.0, 2: 2.0}, noisy={0: 0.0, 1: 1.0}))).run(
        [Request(PROMPT[:1], params)]
    )
    counter.remove()
    assert (sum(counts), len(counts)) == (101, 100), "one token a forward, and the start token"


@pytest.mark.parametrize("shifted", [False, True])
def test_many_requests_are_decoded_by_the_forwards_of_decoding_without_drafts(shifted: bool) -> None:
    """Equal in number and size; the last request, alone at the end, drafts."""
    model = MODELS["shifted" if shifted else "autoregressive"]
    costs = CostTable({1: 1.0, 2: 1.2, 4: 2.0, 24: 22.0}, noisy={0: 0.0, 1: 0.1})
    params = ResolvedParams(block_size=4, max_new_tokens=12, mode="speculative", logit_bias={MASK: float("-inf")})
    requests = [Request((2 + i, *PROMPT), params.replace(max_new_tokens=12 + 30 * (i == 0))) for i in range(8)]
    sizes: dict[bool, list[int]] = {True: [], False: []}
    texts = dict[bool, list[tuple[int, ...]]]()
    for drafts in (False, True):
        chosen = [replace(each, params=each.params.replace(prompt_lookup=drafts)) for each in requests]
        if not drafts:
            chosen = [replace(each, params=each.params.replace(block_size=1)) for each in chosen]
        collect = sizes[drafts].append
        counter = model.register_forward_pre_hook(lambda _, arguments, collect=collect: collect(arguments[0].shape[1]))
        texts[drafts] = [each.ids for each in Engine(model, drafting=statistics_of(costs)).run(chosen)]
        counter.remove()
    assert texts[True] == texts[False]
    num_shared = next(i for i, size in enumerate(sizes[False]) if i > 4 and size == 1)
    assert sizes[True][:num_shared] == sizes[False][:num_shared]
    assert len(sizes[True]) < len(sizes[False])
