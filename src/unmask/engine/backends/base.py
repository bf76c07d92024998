"""The backend: what computes a model, and owns the layout of its KV cache.

Owns the protocol alone. The runner, the scheduler and the sampler know nothing else of a device or a kernel.

Legend: T tokens, N selected tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from unmask.engine.batch import Batch
from unmask.models.arch.config import ModelConfig
from unmask.models.weights.lora_adapter import LoraAdapter


class Backend(Protocol):
    """A way to compute a model. All give the same candidates for the same weights, float rounding aside."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def device(self) -> torch.device:
        """Where a batch's tensors belong."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the KV cache."""
        ...

    @property
    def kernels(self) -> str:
        """What computes, the kind of kernels before a hyphen: the costs of forwards are learnt for it."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """Tokens of prompts that a forward takes beside those of sequences that decode: so many that more would not make
        prefill faster, or would make a step many times longer."""
        ...

    def new_kv_cache(self, num_cache_blocks: int, cache_block_size: int) -> Tensor:
        """Memory for the keys and values of so many cache blocks, in this backend's own layout.

        No slot is read before it is written, so that the memory need not be initialised.
        """
        ...

    def prepare_adapter(self, adapter: LoraAdapter) -> None:
        """Make what `forward` needs of an adapter, which takes a moment; without this call the first forward does.

        Raises:
            ConfigError: the adapter is of another model.
        """
        ...

    def forward(self, batch: Batch, kv_cache: Tensor) -> Tensor:
        """Hidden states [T, D] after the final norm; keys and values of the batch are written to their slots.

        Tokens of sequences with an adapter (`Batch.adapted_runs`) are computed with it, all others as if there were none.
        """
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]."""
        ...

    def greedy(self, hidden_ND: Tensor, banned_id: int | None) -> tuple[Tensor, Tensor]:
        """The likeliest token but `banned_id` (int64 [N]) and its probability (float32 [N])."""
        ...
