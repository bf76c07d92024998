"""The sampler: hidden states in, candidates out, for all scheduled sequences of a forward at once.

Owns the calls of the vocabulary head, and the logits processors: bias, penalties, banned tokens, grammars. What is made of the
candidates is the sequences' matter; how one is drawn, `diffusion.decode`'s.

Legend: T tokens of the forward, D hidden, N queried positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from unmask.diffusion.decode import Guess, candidates, entropies
from unmask.engine.backends.base import Backend
from unmask.engine.logprobs import token_logprobs
from unmask.engine.penalties import penalize
from unmask.engine.policies import POLICIES
from unmask.engine.request import TokenLogprob
from unmask.engine.sequences.base import ModelOutput, ScheduledSequence

_Chosen = tuple[int, list[int], ScheduledSequence]
"""A sequence's place in the forward, the rows of its queries, and itself."""
_SCORED_LOGITS = 2**22
"""Most logits of targets at a time: 16 MiB of float32."""


class Sampler:
    """Samples candidates.

    Args:
        backend: has the vocabulary head.
        mask_id: never a candidate; None for an autoregressive model.
    """

    def __init__(self, backend: Backend, mask_id: int | None) -> None:
        self.backend, self.mask_id = backend, mask_id
        # Tokens by which a model was trained to change a block's length, which is not decoded: never candidates either.
        edits = (backend.config.delete_id, backend.config.insert_id)
        self._banned_ids = [id_ for id_ in edits if id_ is not None]

    def sample(self, hidden_TD: Tensor, scheduled: Sequence[ScheduledSequence]) -> list[ModelOutput | None]:
        """Candidates for every scheduled sequence's queries; None where there are none.

        The head runs twice at most: once for the sequences that only need the most probable token, once for all others;
        and in parts for targets, of which there may be as many as the forward has tokens.
        """
        outputs: list[ModelOutput | None] = [None] * len(scheduled)
        greedy, drawn, start = list[_Chosen](), list[_Chosen](), 0
        for i, each in enumerate(scheduled):
            rows = [start + position - each.start for position in each.logits_positions]
            start += each.stop - each.start
            if each.targets:
                outputs[i] = self._scored(hidden_TD, rows, each)
            elif each.queries:
                (drawn if each.request.needs_logits or self._banned_ids else greedy).append((i, rows, each))
        for sampled, chosen in ((self._greedy, greedy), (self._drawn, drawn)):
            if chosen:
                rows = [row for _, of_sequence, _ in chosen for row in of_sequence]
                in_order = rows == list(range(hidden_TD.shape[0]))
                hidden_ND = hidden_TD if in_order else hidden_TD[torch.tensor(rows, device=hidden_TD.device)]
                for (i, _, _), output in zip(chosen, sampled(hidden_ND, [each for *_, each in chosen]), strict=True):
                    outputs[i] = output
        return outputs

    def _scored(self, hidden_TD: Tensor, rows: Sequence[int], scheduled: ScheduledSequence) -> ModelOutput:
        count, scores = scheduled.request.params.prompt_logprobs, list[TokenLogprob]()
        size = max(1, _SCORED_LOGITS // self.backend.config.vocab_size)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits_NV = self.backend.logits(hidden_TD[torch.tensor(rows[part], device=hidden_TD.device)])
            scores += token_logprobs(logits_NV, scheduled.targets[part], count or 0, self.mask_id)
        guess = Guess(scheduled.queries, scheduled.targets, [math.exp(score.logprob) for score in scores])
        return ModelOutput(guess, scores=scores)

    def _greedy(self, hidden_ND: Tensor, scheduled: Sequence[ScheduledSequence]) -> Iterator[ModelOutput]:
        token_N, confidence_N = self.backend.greedy(hidden_ND, self.mask_id)
        tokens, confidences = token_N.tolist(), confidence_N.tolist()
        start = 0
        for each in scheduled:
            stop = start + len(each.queries)
            yield ModelOutput(Guess(each.queries, tokens[start:stop], confidences[start:stop]))
            start = stop

    def _drawn(self, hidden_ND: Tensor, scheduled: Sequence[ScheduledSequence]) -> Iterator[ModelOutput]:
        logits_NV = self.backend.logits(hidden_ND)
        processed_NV = process(logits_NV, scheduled, self.mask_id, self.backend.config.start_id)
        if self._banned_ids:
            processed_NV[:, self._banned_ids] = float("-inf")
        token_N, confidence_N = draw(processed_NV, scheduled)
        tokens, confidences = token_N.tolist(), confidence_N.tolist()
        for each, part in zip(scheduled, _parts(scheduled), strict=True):
            entropy = (
                entropies(processed_NV[part], None).tolist() if POLICIES[each.request.params.policy].needs_entropy else None
            )
            guess = Guess(each.queries, tokens[part], confidences[part], entropy)
            yield ModelOutput(guess, logits_NV[part], processed_NV[part])


def process(
    logits_NV: Tensor, scheduled: Sequence[ScheduledSequence], mask_id: int | None, start_id: int | None = None
) -> Tensor:
    """A float32 copy of the logits of all queries: biases, then penalties, then bans (ends, grammars, the mask token).

    `start_id` as of `penalize`. Temperature, min-p, top-k and top-p come after all of this, in this order (`candidates`).
    """
    logits_NV = logits_NV.float().clone()
    biased, banned = list[tuple[int, int, float]](), list[tuple[int, int]]()
    parts = _parts(scheduled)
    for each, part in zip(scheduled, parts, strict=True):
        request = each.request
        for row, position in enumerate(each.queries, start=part.start):
            biased += [(row, token, bias) for token, bias in request.params.logit_bias.items()]
            banned += [(row, token) for token in request.banned_ends(position)]
    # Biases first: a ban holds whatever the bias is, and infinities of unlike sign do not meet.
    if biased:
        rows, tokens, values = zip(*biased, strict=True)
        logits_NV[list(rows), list(tokens)] += torch.tensor(values, dtype=torch.float32, device=logits_NV.device)
    for each, part in zip(scheduled, parts, strict=True):
        if each.request.params.has_penalties:
            penalize(logits_NV[part], each, mask_id, start_id)
    if banned:
        rows, tokens = zip(*banned, strict=True)
        logits_NV[list(rows), list(tokens)] = float("-inf")
    for each, part in zip(scheduled, parts, strict=True):
        for index, allowed_V in each.allowed.items():
            logits_NV[part.start + index].masked_fill_(~allowed_V.to(logits_NV.device), float("-inf"))
    if mask_id is not None:
        logits_NV[:, mask_id] = float("-inf")
    return logits_NV


def draw(processed_NV: Tensor, scheduled: Sequence[ScheduledSequence]) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N] and their confidences float32 [N]: one call for all sequences that draw in the same way."""
    ways = [(p.temperature, p.min_p, p.top_k, p.top_p) for p in (each.request.params for each in scheduled)]
    keys = torch.tensor(
        [
            (ways.index(way), position, each.step, each.request.noise_seed, each.request.sample)
            for each, way in zip(scheduled, ways, strict=True)
            for position in each.queries
        ],
        device=processed_NV.device,
    )
    way_N, *key = keys.T
    token_N, confidence_N = torch.empty_like(way_N), torch.empty(len(way_N), device=processed_NV.device)
    one_way = len(set(ways)) == 1
    for first in {ways.index(way) for way in ways}:
        rows = slice(None) if one_way else torch.nonzero(way_N == first)[:, 0]  # a slice copies no logits
        position_N, step_N, seed_N, sample_N = (values_N[rows] for values_N in key)
        params = scheduled[first].request.params
        token_N[rows], confidence_N[rows] = candidates(
            processed_NV[rows], position_N, step_N, params, None, sample=sample_N, seed=seed_N
        )
    return token_N, confidence_N


def _parts(scheduled: Sequence[ScheduledSequence]) -> list[slice]:
    """Rows of each sequence's queries among those of all."""
    return [slice(*bounds) for bounds in pairwise(accumulate((len(each.queries) for each in scheduled), initial=0))]
