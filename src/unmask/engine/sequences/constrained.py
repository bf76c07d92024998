"""Decoding under a grammar: exact at the frontier, provisional to the right of it.

Owns how a denoised block and a grammar that reads from left to right meet. The grammar itself is `engine.grammar`.

The *frontier* is the first position that the grammar has not checked. Its distribution is known exactly (what stands to its
left is final), so the candidate there is the likeliest *allowed* token, and its confidence its probability among the
allowed ones. Tokens accepted further right help the model as context; when the frontier reaches one that the grammar does
not allow, it is masked again. What lies left of the frontier is always a valid prefix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unmask.diffusion.decode import Decision, accept, candidates
from unmask.errors import RequestError

NOTHING_LEFT = "logit_bias and min_new_tokens ban all that the grammar allows here; leave one of them out"

if TYPE_CHECKING:
    from unmask.engine.sequences.base import ModelOutput
    from unmask.engine.sequences.block_diffusion import BlockDiffusionSequence


def fill_forced(sequence: BlockDiffusionSequence, end: int) -> list[int]:
    """Fill in, up to `end`, what the grammar leaves no choice about, over anything provisional; returns the positions."""
    assert sequence.grammar is not None
    filled = []
    while sequence.frontier < end and (tokens := sequence.grammar.forced()[: end - sequence.frontier]):
        for token in tokens:
            _settle(sequence, token)
            filled.append(sequence.frontier - 1)
    sequence.forced.update(filled)
    sequence.note_logprobs(filled, None, {})
    return filled


def advance_frontier(sequence: BlockDiffusionSequence, answer: ModelOutput, end: int) -> Decision:
    """One denoising step of a constrained block that ends at `end`.

    At least one token is settled: the frontier is masked when a forward begins, because a step ends by checking what stands
    there.
    """
    params, guess, logits_NV = sequence.request.params, answer.guess, answer.logits_NV
    assert sequence.grammar is not None
    assert logits_NV is not None
    row_of = {position: i for i, position in enumerate(guess.positions)}
    commits: dict[int, int] = {}
    while sequence.frontier < end and not sequence.grammar.finished:
        place = sequence.frontier
        if not sequence.undecided[place]:
            if sequence.grammar.accepts(sequence.tokens[place]):
                if _settle(sequence, sequence.tokens[place]):
                    break
                continue
            sequence.reopen(place)
        if place not in row_of:
            break
        row = sequence.adjusted(logits_NV[row_of[place]][None], [place])
        row = row.masked_fill(~sequence.grammar.allowed(), float("-inf"))
        at = torch.tensor([place], device=row.device)
        token_1, confidence_1 = candidates(row, at, sequence.step, params, None, sample=sequence.request.sample)
        if commits and not float(confidence_1) > params.threshold:
            break
        token = int(token_1)
        if not sequence.grammar.accepts(token):
            raise RequestError(NOTHING_LEFT)
        commits[place] = token
        if _settle(sequence, token):
            break
        commits |= {p: sequence.tokens[p] for p in fill_forced(sequence, end)}
    right = [i for i, p in enumerate(guess.positions) if p > sequence.frontier and sequence.undecided[p]]
    for i in accept([guess.confidences[i] for i in right], params.threshold, 0):
        place = guess.positions[right[i]]
        sequence.tokens[place], sequence.undecided[place] = guess.tokens[right[i]], False
        commits[place] = guess.tokens[right[i]]
    return Decision(commits)


def _settle(sequence: BlockDiffusionSequence, token: int) -> bool:
    """`token` stands at the frontier for good; whether it ends the text."""
    assert sequence.grammar is not None
    place = sequence.frontier
    sequence.tokens[place], sequence.undecided[place] = token, False
    sequence.frontier += 1
    if token in sequence.request.eos_ids:
        return True
    sequence.grammar.advance(token)
    return False
