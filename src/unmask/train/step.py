"""One micro-batch: corrupt, run the model, score the masked positions.

Owns the way from packed rows to per-prediction losses, and the choice of attention backend. Knows nothing of optimisers, files
or the loop.

Legend: B rows, T stream positions, N predictions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.corrupt import CorruptionConfig, Stream, corrupt, embedding_noise
from unmask.diffusion.masks import CLEAN, StreamIndex, blocked_mask, dense_mask, flex_mask_mod
from unmask.diffusion.objectives import nelbo, token_nll
from unmask.models.arch.attention import Attend, BlockedAttend, DenseAttend, FlexAttend
from unmask.models.arch.transformer import Transformer
from unmask.train.router import RouterMonitor

AttentionBackend = Literal["dense", "blocked", "flex"]


def make_attend(index: StreamIndex, backend: AttentionBackend) -> Attend:
    """The training mask as an attention backend; all backends compute the same."""
    if backend == "dense":
        return DenseAttend(dense_mask(index))
    if backend == "blocked":
        return BlockedAttend(blocked_mask(index))
    # Imported here: it loads torch._dynamo, which takes seconds and which only this backend needs.
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = index.copy_BT.shape
    mask = create_block_mask(flex_mask_mod(index), rows, None, length, length, device=index.copy_BT.device)
    return FlexAttend(mask)


@dataclass(frozen=True)
class MaskNoise:
    """Mask-embedding noise of one step: expected norm, the run's seed, and the token it belongs to."""

    norm: float
    seed: int
    mask_id: int


def predicted_hidden(
    model: Transformer,
    stream: Stream,
    backend: AttentionBackend,
    noise: MaskNoise | None = None,
    router: RouterMonitor | None = None,
) -> Tensor:
    """Hidden states [N, D] of the stream's predictions.

    `noise` is added to the embedding of masked positions; `router` watches where the tokens are sent (None: nobody does).
    """
    extra = None
    if noise is not None and noise.norm > 0:
        extra = embedding_noise(stream, noise.mask_id, model.config.hidden_size, noise.norm, noise.seed)
    if model.config.gated_lora_rank is not None:
        return _gated_hidden(model, stream, backend, extra)[stream.predict]
    attend = make_attend(stream.index, backend)
    with nullcontext() if router is None else router.watching(stream):
        hidden_BTD: Tensor = model(stream.tokens_BT, stream.position_BT, attend, input_noise=extra)
    return hidden_BTD[stream.predict]


def _gated_hidden(model: Transformer, stream: Stream, backend: AttentionBackend, extra: Tensor | None) -> Tensor:
    """Hidden states of the noisy copies. The clean one, whose rows nothing is trained in, runs ahead and keeps no graph."""
    index = stream.index
    count = int((index.copy_BT[0] != CLEAN).sum())
    noisy, clean = (slice(None), slice(count)), (slice(None), slice(count, None))
    assert bool((stream.predict[1] < count).all()), "rows that are not open predict nothing here"
    kept: list[tuple[Tensor, Tensor]] = []
    if count < index.copy_BT.shape[1]:
        with torch.no_grad():
            inner = make_attend(index[clean], backend)
            model(stream.tokens_BT[clean], stream.position_BT[clean], _Keeping(inner, kept))
    noise = None if extra is None else extra[noisy]
    attend = _Behind(DenseAttend(dense_mask(index, queries=index[noisy])), kept)
    noisy_BT = torch.ones_like(index.copy_BT[noisy], dtype=torch.bool)
    out: Tensor = model(stream.tokens_BT[noisy], stream.position_BT[noisy], attend, input_noise=noise, noisy_BT=noisy_BT)
    return out


class _Keeping:
    """An `Attend` that keeps the keys and values it is given, layer by layer."""

    def __init__(self, inner: Attend, kept: list[tuple[Tensor, Tensor]]) -> None:
        self._inner, self._kept = inner, kept

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        self._kept.append((k_BGTS, v_BGTS))
        return self._inner(layer, q_BHTS, k_BGTS, v_BGTS)


class _Behind:
    """An `Attend` for rows that also see kept keys and values, which come after their own."""

    def __init__(self, inner: Attend, kept: list[tuple[Tensor, Tensor]]) -> None:
        self._inner, self._kept = inner, kept

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        if self._kept:
            k, v = self._kept[layer]
            k_BGTS, v_BGTS = torch.cat((k_BGTS, k), dim=2), torch.cat((v_BGTS, v), dim=2)
        return self._inner(layer, q_BHTS, k_BGTS, v_BGTS)


def score_stream(
    model: Transformer, stream: Stream, mask_id: int | None, backend: AttentionBackend, noise: MaskNoise | None = None
) -> Tensor:
    """Negative log-likelihood [N] (float32, nats) of every token the stream asks for, with gradient."""
    return token_nll(model.head, predicted_hidden(model, stream, backend, noise), stream.target_N, mask_id)


@dataclass(frozen=True)
class Evaluation:
    """Held-out quality at one block size: NELBO per token, and mean masked cross-entropy by quarter of the mask rate (nats)."""

    nelbo: float
    ce_by_quarter: tuple[float | None, float | None, float | None, float | None]


@torch.no_grad()
def evaluate(
    model: Transformer, parts: Iterable[PackedRows], corruption: CorruptionConfig, backend: AttentionBackend, seed: int
) -> Evaluation:
    """Score held-out rows, part by part, under one fixed corruption, so that figures of different steps compare."""
    total, maskable = 0.0, 0
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for rows in parts:
        stream = corrupt(rows, corruption, seed)
        nll_N = score_stream(model, stream, corruption.mask_id, backend)
        total += float(nelbo(nll_N, stream.weight_N, 1))
        maskable += stream.num_maskable
        quarter_N = (stream.t_N * 4).ceil().clamp(1, 4).long().cpu() - 1
        sums.index_add_(0, quarter_N, nll_N.double().cpu())
        counts.index_add_(0, quarter_N, torch.ones(len(quarter_N), dtype=torch.float64))
    means = [float(s / c) if c else None for s, c in zip(sums, counts, strict=True)]
    return Evaluation(total / max(maskable, 1), (means[0], means[1], means[2], means[3]))
