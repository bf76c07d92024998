"""Log-probabilities of given tokens under the model's own distribution, with the likeliest alternatives.

Owns what `logprobs` and `prompt_logprobs` report. The distribution is the model's: before bias, temperature and grammar, and
without the mask token.

Legend: N queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.diffusion.objectives import ban_mask
from unmask.engine.request import TokenLogprob


def token_logprobs(logits_NV: Tensor, tokens: Sequence[int], count: int, mask_id: int | None) -> list[TokenLogprob]:
    """The log-probability of a token for every row of logits, in nats, and those of its `count` likeliest alternatives.

    Args:
        logits_NV: as the model gives them, any float dtype; computed in float32.
        tokens: N ids.
        count: alternatives of each, the token itself among them where it is so likely.
        mask_id: never a prediction; None for an autoregressive model.
    """
    logprobs_NV = ban_mask(logits_NV.float(), mask_id).log_softmax(-1)
    own_N = logprobs_NV.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logits_NV.device)[:, None])[:, 0]
    best = logprobs_NV.topk(min(count, logprobs_NV.shape[-1]), dim=-1)
    rows = zip(tokens, own_N.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(token, own, tuple(zip(ids, values, strict=True))) for token, own, ids, values in rows]
