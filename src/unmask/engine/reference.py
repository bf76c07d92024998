"""The oracle: block-diffusion decoding without a cache, in one screen. Kept for ever; every faster path must equal it.

Owns the plainest statement of LLaDA2.0's and 2.1's decoding. Must not be optimised. Knows no grammar and no stop strings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from unmask.diffusion.decode import Guess, candidates, decide, entropies
from unmask.diffusion.masks import block_causal_mask
from unmask.diffusion.objectives import ban_mask
from unmask.engine.penalties import REPEATED
from unmask.engine.policies import choose
from unmask.engine.request import Completion, DecodingStep, OnStep, Request, finish
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer


@torch.inference_mode()
def generate_reference(model: Transformer, request: Request, mask_id: int, on_step: OnStep | None = None) -> Completion:
    """Decode block by block, running the whole canvas up to the current block at every step.

    Args:
        model: any family, any float dtype.
        request: ids and decoding options.
        mask_id: the mask token.
        on_step: sees every step.

    Returns:
        The completion; `forwards` counts the passes made here.

    Source: LLaDA2.0 section 5; LLaDA2.1 for edits; penalties as `engine.penalties` defines them.
    """
    request.check(model.config)
    params, size = request.params, request.params.block_size
    rest = request.canvas_length - len(request.ids)
    canvas = [mask_id if token is None else token for token in request.ids] + [mask_id] * rest
    undecided = [token is None for token in request.ids] + [True] * rest
    fixed = [not masked for masked in undecided]
    to_decide = [position for position, masked in enumerate(undecided) if masked]
    first = to_decide[0] // size * size
    forwards = 0
    for front in range(first, len(canvas), size):
        if not any(undecided[front : front + size]):
            continue
        end, step, post_steps, done = front + size, 0, 0, False
        window = max(first, front - (params.window - 1) * size) if params.editing else front
        while not done:
            had_masks = any(undecided[front:end])
            queries = [p for p in to_decide if window <= p < end and (params.editing or undecided[p])]
            decided = {p: canvas[p] for p in to_decide if not undecided[p]}
            logits = _logits(model, canvas[:end], queries, window, request, mask_id, decided)
            forwards += 1
            query_positions = torch.tensor(queries)
            draw_key = {"sample": request.sample, "seed": request.noise_seed}
            token, confidence = candidates(logits, query_positions, step, params, None, **draw_key)
            guess = Guess(queries, token.tolist(), confidence.tolist(), entropies(logits, None).tolist())
            editable = {p: token for p, token in decided.items() if p in queries}
            decision = decide(guess, editable, partial(choose, step=step, params=params), params.edit_threshold)
            for position, chosen in (*decision.commits.items(), *decision.edits.items()):
                canvas[position], undecided[position] = chosen, False
            if on_step is not None:
                on_step(DecodingStep.after(range(window, end), guess, decision, canvas, undecided, fixed, forwards))
            step += 1
            post_steps += not had_masks
            filled = not any(undecided[front:end])
            done = filled
            if params.editing:
                done = filled and (post_steps >= params.max_post_steps or (not had_masks and not decision.edits))
            if done or not params.editing:
                stable = next((p for p in to_decide if undecided[p]), len(canvas))
                text = [canvas[p] for p in to_decide if p < stable]
                if request.end_ids.intersection(text) or len(text) >= request.num_wanted:
                    return finish(text, request, forwards)
    raise AssertionError("a canvas holds all that is to be decided")


def _logits(
    model: Transformer,
    canvas: list[int],
    queries: list[int],
    final: int,
    request: Request,
    mask_id: int,
    decided: Mapping[int, int],
) -> Tensor:
    """Logits at the positions `queries`, with what the request bans or favours; tokens below `final` do not change any more.

    `decided` has the tokens of the completion by position.
    """
    end = len(canvas)
    context = final if model.config.shifted else 0
    mask = DenseAttend(block_causal_mask(end, end, request.params.block_size, context=context)[None])
    read = torch.tensor(model.config.inputs(canvas, 0, end))[None]
    positions = torch.arange(end)[None]
    logits = ban_mask(model.head(model(read, positions, mask, noisy_BT=positions >= context))[0, queries], mask_id)
    for row, position in enumerate(queries):
        for token, bias in request.params.logit_bias.items():
            logits[row, token] += bias
        _penalize(logits[row], {p: token for p, token in decided.items() if p != position}, position, request, model.config)
        logits[row, sorted(request.banned_ends(position))] = float("-inf")
    return logits


def _penalize(logits_V: Tensor, others: Mapping[int, int], position: int, request: Request, config: ModelConfig) -> None:
    """Penalties at one position, in place; `others` are the tokens of the completion that are decided elsewhere."""
    params = request.params
    counts, seen = Counter(others.values()), {config.start_id, *request.ids, *others.values()} - {None}
    for token in seen if params.repetition_penalty != 1 else ():
        logits_V[token] *= 1 / params.repetition_penalty if logits_V[token] > 0 else params.repetition_penalty
    for token, count in counts.items():
        logits_V[token] -= params.frequency_penalty * count + params.presence_penalty
    size = params.no_repeat_ngram_size
    whole = {tuple(range(p, p + size)) for p in others} if size else set()
    ngrams = [tuple(others[p] for p in places) for places in whole if others.keys() >= set(places)]
    repeated = set()
    for places in (range(position - offset, position - offset + size) for offset in range(size)):
        around = [None if p == position else others.get(p) for p in places]
        if around.count(None) == 1:
            hole = around.index(None)
            repeated |= {ngram[hole] for ngram in ngrams if [*ngram[:hole], None, *ngram[hole + 1 :]] == around}
    logits_V[sorted(repeated)] -= REPEATED
