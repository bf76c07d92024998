"""Penalties: logits that depend on the tokens of prompt and completion.

Owns what counts as a repetition, and the state that it is counted in. That state is what the forward *reads*:

- Decoding from left to right, a position sees the tokens before it. Draft tokens are among them, so that a verify token sees
  what decoding token by token would have there: where the drafts before it are accepted they are that text, and elsewhere it
  is not used.
- In block diffusion, a position sees every decided token but its own: those of earlier blocks, and those to its left and right
  in the blocks that are open. Tokens that one step decides together do not see each other.

Legend: Q queried positions of a sequence, V vocabulary, C tokens of the completion, U different tokens, W n-grams,
N their size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unmask.engine.batch import Ints
from unmask.engine.sampling_params import ResolvedParams
from unmask.engine.sequences.base import ScheduledSequence

REPEATED = 1e4
"""Subtracted from the logit of a token that would repeat an n-gram, in nats: finite, where a grammar has no other choice."""


def penalize(logits_QV: Tensor, scheduled: ScheduledSequence, mask_id: int | None, start_id: int | None) -> None:
    """Apply the penalties of a sequence to the logits of its queries, in place.

    With count c of a token in the completion that the position sees: the repetition penalty divides a positive logit, and
    multiplies another, where c > 0 or the token stands in the prompt; then frequency_penalty * c and, where c > 0,
    presence_penalty are subtracted; then come tokens that would complete an n-gram of the completion.

    Args:
        logits_QV: float, with biases added.
        scheduled: the sequence.
        mask_id: of undecided positions; None for an autoregressive model.
        start_id: what a shifted model reads before the prompt and other models in it; None: there is no such token.

    Source: repetition penalty: CTRL (1909.05858) as in Hugging Face's processor; frequency and presence: OpenAI's API.
    """
    params = scheduled.request.params
    position_C, token_C = _completion(scheduled, mask_id)
    query_Q1 = np.array(scheduled.queries)[:, None]
    sees_QC = position_C < query_Q1 if scheduled.left_to_right else position_C != query_Q1
    prompt = {token for token in (start_id, *scheduled.request.ids) if token is not None}
    prompt_ids = np.array(sorted(prompt) if params.repetition_penalty != 1 else [], dtype=np.int64)
    token_U, index = np.unique(np.concatenate((token_C, prompt_ids)), return_inverse=True)
    index_C = index[: len(token_C)]
    count_QU = np.stack([np.bincount(index_C[sees_C], minlength=len(token_U)) for sees_C in sees_QC])
    columns_U, count, in_prompt_U = (
        torch.from_numpy(each).to(logits_QV.device) for each in (token_U, count_QU, np.isin(token_U, prompt_ids))
    )
    logits_QV[:, columns_U] = _penalized(logits_QV[:, columns_U], count, in_prompt_U, params)
    if params.no_repeat_ngram_size:
        for row, banned in enumerate(_repetitions(scheduled, position_C, token_C)):
            logits_QV[row, banned] -= REPEATED


def _penalized(logits_QU: Tensor, count_QU: Tensor, in_prompt_U: Tensor, params: ResolvedParams) -> Tensor:
    by = params.repetition_penalty
    if by != 1:
        repeated_QU = torch.where(logits_QU > 0, logits_QU / by, logits_QU * by)
        logits_QU = torch.where((count_QU > 0) | in_prompt_U, repeated_QU, logits_QU)
    return logits_QU - params.frequency_penalty * count_QU - params.presence_penalty * (count_QU > 0)


def _completion(scheduled: ScheduledSequence, mask_id: int | None) -> tuple[Ints, Ints]:
    """Positions and tokens of the completion that the forward reads, without undecided ones."""
    ids = scheduled.request.ids
    holes = [position for position, token in enumerate(ids[: scheduled.stop]) if token is None]
    position_C = np.array([*holes, *range(len(ids), scheduled.stop)], dtype=np.int64)
    token_C = np.array(scheduled.tokens[: scheduled.stop], dtype=np.int64)[position_C]
    decided_C = token_C != (-1 if mask_id is None else mask_id)
    return position_C[decided_C], token_C[decided_C]


def _repetitions(scheduled: ScheduledSequence, position_C: Ints, token_C: Ints) -> list[Ints]:
    """For every query the tokens that would make an n-gram around it one that the completion holds elsewhere.

    From left to right only n-grams that end at the query count, and only those before it.
    """
    size = scheduled.request.params.no_repeat_ngram_size
    if len(token_C) < size:
        return [np.empty(0, dtype=np.int64)] * len(scheduled.queries)
    ngram_WN = np.lib.stride_tricks.sliding_window_view(token_C, size)
    first_W, last_W = position_C[: len(ngram_WN)], position_C[size - 1 :]
    is_whole_W = last_W - first_W == size - 1  # no hole, no undecided position in it
    ngram_WN, first_W, last_W = ngram_WN[is_whole_W], first_W[is_whole_W], last_W[is_whole_W]
    token_at = dict(zip(position_C.tolist(), token_C.tolist(), strict=True))
    banned = []
    for query in scheduled.queries:
        elsewhere_W = last_W < query if scheduled.left_to_right else (last_W < query) | (first_W > query)
        found = [np.empty(0, dtype=np.int64)]
        for offset in range(size)[-1:] if scheduled.left_to_right else range(size):
            others = [i for i in range(size) if i != offset]
            around = [token_at.get(query - offset + i) for i in others]
            if None not in around:
                same_W = (ngram_WN[:, others] == np.array(around, dtype=np.int64)).all(1)
                found.append(ngram_WN[same_W & elsewhere_W, offset])
        banned.append(np.unique(np.concatenate(found)))
    return banned
