"""Next-token decoding through the same model and cache: the baseline diffusion is measured against.

Owns the causal loop, for one sequence and for a batch of them. Logits at a position predict the *next* token here.

Legend: B batch, T tokens, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.diffusion.decode import DecodeRules, candidates
from unmask.engine.cache import KVCache
from unmask.engine.completion import Completion, OnStep, Prompt, Step, finish
from unmask.errors import RequestError
from unmask.models.transformer import Transformer

_SHRINK_SHARE = 0.75
"""Sequences still going, as a share of the batch, at which ended ones leave it: leaving copies the cache."""


@torch.inference_mode()
def generate_autoregressive(
    model: Transformer, prompt: Prompt, rules: DecodeRules, on_step: OnStep | None = None
) -> Completion:
    """Decode one token per forward.

    Args:
        model: an autoregressive model.
        prompt: at least one token.
        rules: only temperature, top_k, top_p and seed matter.
        on_step: sees every token as a block of one.

    Returns:
        The completion.
    """
    return generate_batch(model, [prompt], rules, on_step=on_step)[0]


@torch.inference_mode()
def generate_batch(
    model: Transformer,
    prompts: Sequence[Prompt],
    rules: DecodeRules,
    *,
    mask_id: int | None = None,
    on_step: OnStep | None = None,
) -> list[Completion]:
    """Decode several prompts together, one token per sequence and forward; prompts are padded on the left.

    The batch shrinks as sequences end. `on_step` sees the first sequence.
    """
    if not prompts or any(not prompt.ids for prompt in prompts):
        raise RequestError("autoregressive decoding needs at least one prompt token")
    for prompt in prompts:
        prompt.check(model.config)
    device = model.embed.weight.device
    width, budget = max(len(p.ids) for p in prompts), max(p.max_new_tokens for p in prompts)
    pad_B = torch.tensor([width - len(p.ids) for p in prompts], device=device)
    tokens_BT = torch.tensor([[0] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=device)
    cache = KVCache(model.config, width + budget, batch=len(prompts), dtype=model.embed.weight.dtype, device=device)
    generated: list[list[int]] = [[] for _ in prompts]
    rows, forwards = list(range(len(prompts))), 0
    while rows:
        hidden_BD = _forward(model, cache, tokens_BT, pad_B)
        position_B = cache.length - pad_B
        token_B, _ = candidates(model.head(hidden_BD), position_B, 0, rules, mask_id)
        for row, token in zip(rows, token_B.tolist(), strict=True):
            if not _ended(generated[row], prompts[row]):
                generated[row].append(token)
        forwards += 1
        if on_step is not None and len(generated[0]) == forwards:
            last = generated[0][-1]
            on_step(Step(int(position_B[0]), 0, (last,), (last,), (True,), forwards))
        going = [i for i, row in enumerate(rows) if not _ended(generated[row], prompts[row])]
        tokens_BT = token_B[:, None]
        if len(going) <= _SHRINK_SHARE * len(rows):
            rows = [rows[i] for i in going]
            index = torch.tensor(going, dtype=torch.int64, device=device)
            cache.keep_rows(index)
            pad_B, tokens_BT = pad_B[index], tokens_BT[index]
    return [finish(ids, prompt, len(ids)) for ids, prompt in zip(generated, prompts, strict=True)]


def _ended(ids: list[int], prompt: Prompt) -> bool:
    return (bool(ids) and ids[-1] in prompt.eos_ids) or len(ids) >= prompt.max_new_tokens


def _forward(model: Transformer, cache: KVCache, tokens_BT: Tensor, pad_B: Tensor) -> Tensor:
    """Commit `tokens_BT` and return the hidden state [B, D] of the last one."""
    start, count = cache.length, tokens_BT.shape[1]
    query_T = torch.arange(start, start + count, device=tokens_BT.device)
    key_K = torch.arange(start + count, device=tokens_BT.device)
    padded = bool(pad_B.any())
    if count == 1 and not padded:
        mask = None
    else:
        # A padding query sees itself, so that no row of the softmax is empty.
        visible = (key_K >= pad_B[:, None, None]) & (key_K <= query_T[:, None]) | (key_K == query_T[:, None])
        mask = visible[:, None]
    positions_BT = (query_T - pad_B[:, None]).clamp(min=0)
    hidden = model(tokens_BT, positions_BT, cache.attend(mask))
    cache.commit(count)
    out: Tensor = hidden[:, -1]
    return out
