"""The runner: one forward, scheduled sequences in, model outputs out.

Owns the KV cache (as the backend made it) and the call of the backend. Knows nothing of what the candidates are for.

Legend: T tokens, D hidden, N queried positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.diffusion.decode import Guess, candidates, entropies
from unmask.engine.backends.base import Backend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence


class Runner:
    """Runs scheduled sequences on a backend.

    Args:
        backend: computes the model.
        num_cache_blocks: of the KV cache.
        cache_block_size: tokens in a cache block.
        mask_id: never a candidate; None for an autoregressive model.
    """

    def __init__(self, backend: Backend, num_cache_blocks: int, cache_block_size: int, mask_id: int | None) -> None:
        self.backend, self.cache_block_size, self.mask_id = backend, cache_block_size, mask_id
        self.kv_cache = backend.new_kv_cache(num_cache_blocks, cache_block_size)

    @torch.inference_mode()
    def run(self, work: Sequence[tuple[DecodingSequence, ScheduledSequence]]) -> list[ModelOutput | None]:
        """One forward over all scheduled sequences; an output for each, None for one without queries."""
        slices, asked, offset = [], [], 0
        for sequence, plan in work:
            asked.append([offset + row - plan.start for row in plan.rows])
            tokens = self.backend.config.inputs(sequence.tokens, plan.start, plan.stop)
            size, causal_end = sequence.mask_block_size, plan.causal_end
            slices.append(SequenceSlice(tokens, plan.start, sequence.block_table, size, causal_end))
            offset += plan.stop - plan.start
        batch = Batch.build(slices, self.cache_block_size, self.backend.device)
        hidden_TD = self.backend.forward(batch, self.kv_cache)
        plain = self._plain_guesses(hidden_TD, work, asked)
        return [
            plain[i] if i in plain else self._answer(hidden_TD[rows], sequence, plan) if rows else None
            for i, (rows, (sequence, plan)) in enumerate(zip(asked, work, strict=True))
        ]

    def _plain_guesses(
        self, hidden_TD: Tensor, work: Sequence[tuple[DecodingSequence, ScheduledSequence]], asked: Sequence[Sequence[int]]
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

    def _answer(self, hidden_ND: Tensor, sequence: DecodingSequence, plan: ScheduledSequence) -> ModelOutput:
        logits_NV = self.backend.logits(hidden_ND)
        params = sequence.request.params
        adjusted = sequence.adjusted(logits_NV, plan.queries)
        positions = torch.tensor(plan.queries, device=adjusted.device)
        token_N, confidence_N = candidates(adjusted, positions, sequence.step, params, None, sample=sequence.request.sample)
        of_N = entropies(adjusted, None).tolist() if params.policy == "entropy" else None
        return ModelOutput(Guess(plan.queries, token_N.tolist(), confidence_N.tolist(), of_N), logits_NV)
