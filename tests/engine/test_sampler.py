"""The sampler: logits processed and candidates drawn for all sequences at once, as for each alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny import MASK, tiny_model
from unmask.diffusion.decode import candidates, entropies
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.request import Request
from unmask.engine.sampler import Sampler, process
from unmask.engine.sampling_params import ResolvedParams
from unmask.engine.sequences.base import ScheduledSequence

BACKEND = TorchBackend(tiny_model("llama", 1, torch.float64))
INFINITY = float("inf")


def scheduled(
    queries: tuple[int, ...], *, start: int = 0, step: int = 0, allowed: dict[int, Tensor] | None = None, **options: Any
) -> ScheduledSequence:
    eos, sample = options.pop("eos", ()), options.pop("sample", 0)
    request = Request((1, 2, 3), ResolvedParams(**{"max_new_tokens": 9, **options}), frozenset(eos), sample=sample)
    stop = max((start, *queries)) + 1
    return ScheduledSequence(request, [0] * 20, start, stop, queries, queries, 0, 4, step, allowed or {})


def test_processing_favours_bans_and_allows() -> None:
    allowed_V = torch.zeros(8, dtype=torch.bool)
    allowed_V[[1, 6]] = True
    batch = [
        scheduled((3, 4), logit_bias={2: 1.5, 5: -INFINITY}, eos=(7,)),
        scheduled((3, 5), eos=(6, 7), min_new_tokens=2),
        scheduled((8,), allowed={0: allowed_V}),
    ]
    logits = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, found = logits.clone(), process(logits, batch, 0)
    expected = before.float()
    expected[:2, 2] += 1.5
    expected[:2, 5] = -INFINITY
    expected[:, 0] = -INFINITY
    expected[2, [6, 7]] = -INFINITY  # position 3, where the end may not come before position 5
    expected[4, ~allowed_V] = -INFINITY
    assert torch.equal(found, expected)
    assert torch.equal(logits, before)


def test_a_ban_holds_whatever_the_bias() -> None:
    only_one_V = torch.arange(8) == 1
    batch = [
        scheduled((3,), logit_bias={7: 3e38}, eos=(7,), min_new_tokens=2),
        scheduled((8,), logit_bias={2: 3e38}, allowed={0: only_one_V}),
    ]
    processed = process(torch.zeros(2, 8), batch, 0)
    assert processed[0, 7] == -INFINITY
    assert torch.equal(processed[1].isfinite(), only_one_V)


def test_sequences_sample_together_what_they_sample_alone() -> None:
    """Greedy and drawn, of unlike temperatures, filters, seeds, steps and samples; one asks nothing."""
    batch = [
        scheduled((3, 4, 6), step=2, temperature=0.9, seed=5),
        scheduled((), start=2),
        scheduled((1, 2), start=1),
        scheduled((4,), temperature=0.9, seed=-3, sample=2),
        scheduled((0, 7), temperature=1.4, top_k=9, top_p=0.8),
        scheduled((0, 7), temperature=1.4, top_k=9, top_p=0.8, min_p=0.6),
        scheduled((2,), policy="entropy"),
        scheduled((5,), logprobs=1),
    ]
    total = sum(each.stop - each.start for each in batch)
    hidden = torch.randn(total, BACKEND.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    offset = 0
    for each, output in zip(batch, Sampler(BACKEND, MASK).sample(hidden, batch), strict=True):
        rows = [offset + position - each.start for position in each.queries]
        offset += each.stop - each.start
        if not rows:
            assert output is None
            continue
        assert output is not None
        logits, params = BACKEND.logits(hidden[rows]), each.request.params
        key = (torch.tensor(each.queries), each.step, params, MASK)
        tokens, confidences = candidates(logits, *key, sample=each.request.sample, seed=each.request.noise_seed)
        assert list(output.guess.tokens) == tokens.tolist()
        torch.testing.assert_close(torch.tensor(output.guess.confidences), confidences)
        assert (output.logits_NV is not None) == each.request.needs_logits
        if params.policy == "entropy":
            torch.testing.assert_close(torch.tensor(output.guess.entropies), entropies(logits, MASK))
