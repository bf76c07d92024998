"""Losses of the predictions of a stream, for tests of corruption and objectives."""

from __future__ import annotations

from torch import Tensor

from unmask.diffusion.corrupt import Stream
from unmask.diffusion.objectives import token_nll
from unmask.models.arch.transformer import Transformer
from unmask.train.forward import AttentionBackend, predicted_hidden


def score_stream(model: Transformer, stream: Stream, mask_id: int | None, backend: AttentionBackend) -> Tensor:
    """Negative log-likelihood [N] (float32, nats) of the targets of a stream, with gradient."""
    return token_nll(model.head, predicted_hidden(model, stream, backend), stream.target_N, mask_id)
