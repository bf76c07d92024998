"""The oracle: block-diffusion decoding without a cache, in one screen. Kept for ever; every faster path must equal it.

Owns the plainest statement of LLaDA2.0's decoding. Must not be optimised.
"""

from __future__ import annotations

import torch

from unmask.diffusion.blocks import num_blocks
from unmask.diffusion.decode import DecodeRules, accept, candidates, step_quota
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.completion import Completion, Prompt, finish
from unmask.models.attention import DenseAttend
from unmask.models.transformer import Transformer


@torch.inference_mode()
def generate_reference(model: Transformer, prompt: Prompt, rules: DecodeRules, mask_id: int) -> Completion:
    """Decode block by block, running the whole canvas up to the current block at every step.

    Args:
        model: any family, any float dtype.
        prompt: ids and limits.
        rules: block size, threshold, steps, sampling.
        mask_id: the mask token.

    Returns:
        The completion; `forwards` counts the passes made here.

    Source: LLaDA2.0 section 5.
    """
    prompt.check(model.config)
    size = rules.block_size
    length = num_blocks(len(prompt.ids) + prompt.max_new_tokens, size) * size
    canvas = torch.full((length,), mask_id)
    canvas[: len(prompt.ids)] = torch.tensor(prompt.ids, dtype=torch.int64)
    undecided = torch.arange(length) >= len(prompt.ids)
    forwards = 0
    for block in range(len(prompt.ids) // size, length // size):
        end = (block + 1) * size
        mask = DenseAttend(block_causal_mask(end, end, size)[None])
        for step in range(size):
            if not undecided[:end].any():
                break
            logits = model.head(model(canvas[None, :end], torch.arange(end)[None], mask))[0]
            forwards += 1
            where = torch.nonzero(undecided[:end])[:, 0]
            token, confidence = candidates(logits[where], where, step, rules, mask_id)
            chosen = accept(confidence, torch.ones_like(where, dtype=torch.bool), rules.threshold, step_quota(step, rules))
            canvas[where[chosen]] = token[chosen]
            undecided[where[chosen]] = False
            for position in range(len(prompt.ids), end):
                if undecided[position]:
                    break
                if int(canvas[position]) in prompt.eos_ids:
                    return finish(canvas[len(prompt.ids) : position + 1].tolist(), prompt, forwards)
    return finish(canvas[len(prompt.ids) :].tolist(), prompt, forwards)
