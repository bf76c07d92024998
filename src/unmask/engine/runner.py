"""The runner: one forward, scheduled sequences in, model outputs out.

Owns the KV cache (as the backend made it) and the order of a step: batch, forward, sampling. Knows nothing of what the
candidates are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unmask.engine.backends.base import Backend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.engine.sampler import Sampler
from unmask.engine.sequences.base import ModelOutput, ScheduledSequence


class Runner:
    """Runs scheduled sequences on a backend.

    Args:
        backend: computes the model.
        num_cache_blocks: of the KV cache.
        cache_block_size: tokens in a cache block.
        mask_id: never a candidate; None for an autoregressive model.
    """

    def __init__(self, backend: Backend, num_cache_blocks: int, cache_block_size: int, mask_id: int | None) -> None:
        self.backend, self.cache_block_size = backend, cache_block_size
        self.sampler = Sampler(backend, mask_id)
        self.kv_cache = backend.new_kv_cache(num_cache_blocks, cache_block_size)

    @torch.inference_mode()
    def run(self, scheduled: Sequence[ScheduledSequence]) -> list[ModelOutput | None]:
        """One forward over all scheduled sequences; an output for each, None for one without queries."""
        inputs = self.backend.config.inputs
        slices = [
            SequenceSlice(
                inputs(each.tokens, each.start, each.stop),
                each.start,
                each.block_table,
                each.mask_block_size,
                each.causal_end,
                each.request.adapter,
            )
            for each in scheduled
        ]
        batch = Batch(slices, self.cache_block_size, self.backend.device)
        return self.sampler.sample(self.backend.forward(batch, self.kv_cache), scheduled)
