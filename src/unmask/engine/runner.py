"""One forward: rows in, candidates out.

Owns the store of keys and values and the call of the model. Knows nothing of what the candidates are for.

Legend: L layers, G kv heads, P slots, S head dim, T rows, D hidden, N queried rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Protocol

import torch
from torch import Tensor

from unmask.diffusion.decode import Guess, candidates, entropies, greedy_candidates
from unmask.diffusion.objectives import ban_mask
from unmask.engine.sequences.base import ModelOutput, ScheduledSequence, Sequence
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.rows import PagedAttend, Rows, Segment


class Backend(Protocol):
    """A way to compute a model. All give the same candidates for the same weights."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its inputs live."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        ...

    def forward(self, rows: Rows, store: Tensor) -> Tensor:
        """Hidden states [T, D] after the final norm; keys and values of the rows are written to `store` [L, 2, G, P, S]."""
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]."""
        ...

    def greedy(self, hidden_ND: Tensor, banned_id: int | None) -> tuple[Tensor, Tensor]:
        """The likeliest token but `banned_id` (int64 [N]) and its probability (float32 [N])."""
        ...


class TorchBackend:
    """The plain one: the model as it is, in eager PyTorch. Every other backend is held to it."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed.weight.dtype

    def forward(self, rows: Rows, store: Tensor) -> Tensor:
        attend = PagedAttend(store, rows)
        noisy_BT = None if self.config.gated_lora_rank is None else rows.noisy_T[None]
        hidden: Tensor = self.model(rows.tokens_T[None], rows.positions_T[None], attend, noisy_BT=noisy_BT)
        return hidden[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.model.head(hidden_ND)

    def greedy(self, hidden_ND: Tensor, banned_id: int | None) -> tuple[Tensor, Tensor]:
        logits_NV = self.model.head(hidden_ND)
        return greedy_candidates(logits_NV if banned_id is None else ban_mask(logits_NV, banned_id))


class Runner:
    """Runs plans on a backend.

    Args:
        backend: computes the model.
        num_slots: tokens that the store holds.
        mask_id: never a candidate; None for an autoregressive model.
    """

    def __init__(self, backend: Backend, num_slots: int, mask_id: int | None) -> None:
        self.backend, self.mask_id = backend, mask_id
        config = backend.config
        shape = (config.num_layers, 2, config.num_kv_heads, num_slots, config.head_dim)
        # Not zeroed: pages of memory that are never used cost nothing, and no slot is read before it is written.
        self.store = torch.empty(shape, dtype=backend.dtype, device=backend.device)

    @torch.inference_mode()
    def run(self, work: List[tuple[Sequence, ScheduledSequence]]) -> list[ModelOutput | None]:
        """One forward over all plans; an answer for each, None for one that asks nothing."""
        segments, tokens, asked, offset = list[Segment](), [], [], 0
        for sequence, plan in work:
            asked.append([offset + row - plan.start for row in plan.rows])
            tokens.append(self.backend.config.inputs(sequence.tokens, plan.start, plan.stop))
            segments += self._segments(sequence, plan, offset)
            offset += plan.stop - plan.start
        hidden_TD = self.backend.forward(Rows.join(tokens, segments, self.backend.device), self.store)
        plain = self._plain_guesses(hidden_TD, work, asked)
        return [
            plain[i] if i in plain else self._answer(hidden_TD[rows], sequence, plan) if rows else None
            for i, (rows, (sequence, plan)) in enumerate(zip(asked, work, strict=True))
        ]

    def _segments(self, sequence: Sequence, plan: ScheduledSequence, offset: int) -> Iterator[Segment]:
        """A plan's rows, from `offset` on: those that are read causally, and those that are read in blocks."""
        slots_K = sequence.slots_K[: plan.stop].to(self.backend.device)
        border = min(max(plan.border, plan.start), plan.stop)
        for start, stop, size in ((plan.start, border, 1), (border, plan.stop, sequence.open_size)):
            if start < stop:
                first, last = offset + start - plan.start, offset + stop - plan.start
                yield Segment(first, last, start, size, slots_K[:stop], sequence.consecutive, open=start >= border)

    def _plain_guesses(
        self, hidden_TD: Tensor, work: List[tuple[Sequence, ScheduledSequence]], asked: List[List[int]]
    ) -> dict[int, ModelOutput]:
        """Answers of all sequences that need no logits, from one pass of the head."""
        plain = [i for i, (sequence, _) in enumerate(work) if asked[i] and sequence.is_plain]
        if not plain:
            return {}
        where = torch.tensor([row for i in plain for row in asked[i]], device=hidden_TD.device)
        token_N, confidence_N = self.backend.greedy(hidden_TD[where], self.mask_id)
        tokens, confidences = token_N.tolist(), confidence_N.tolist()
        answers, start = {}, 0
        for i in plain:
            stop = start + len(asked[i])
            answers[i] = ModelOutput(Guess(work[i][1].queries, tokens[start:stop], confidences[start:stop]), None)
            start = stop
        return answers

    def _answer(self, hidden_ND: Tensor, sequence: Sequence, plan: ScheduledSequence) -> ModelOutput:
        logits_NV = self.backend.logits(hidden_ND)
        params = sequence.request.params
        adjusted = sequence.adjusted(logits_NV, plan.queries)
        positions = torch.tensor(plan.queries, device=adjusted.device)
        token_N, confidence_N = candidates(adjusted, positions, sequence.step, params, None, sample=sequence.request.sample)
        of_N = entropies(adjusted, None).tolist() if params.policy == "entropy" else None
        return ModelOutput(Guess(plan.queries, token_N.tolist(), confidence_N.tolist(), of_N), logits_NV)
