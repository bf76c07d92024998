"""Log-likelihood of a continuation: exact for an autoregressive model, a lower bound (-NELBO) for a diffusion model.

Owns the low-variance estimator of the NELBO and the sharing of keys and values between its forwards. Knows token ids only.

A block with `m` positions to score contributes `E_k E_S [(m / k) sum_{i in S} -log p(x_i | x but S)]`, with k
uniform in 1..m and S uniform among the subsets of size k. Where all 2^m - 1 subsets are no more than `samples`, the sum over
them is exact; otherwise k is stratified over the samples, and the standard error is reported.

Source: LLaDA2.0 Eq. 5, in the fixed-count form of LLaDA (2502.09992) Eq. 6, per block.
Legend: L layers, G kv heads, P slots, S head dim, N queried rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.diffusion.objectives import ban_mask
from unmask.engine.batch import Batch, SequenceSlice
from unmask.engine.llm import LanguageModel
from unmask.engine.sampling_params import BLOCK_SIZE
from unmask.errors import ConfigError, RequestError


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a continuation, in nats.

    Attributes:
        value: log-likelihood, or for a diffusion model its estimated lower bound, -NELBO.
        error: standard error of the estimate; 0 where it is exact.
        exact: no mask was sampled.
        tokens: number of tokens of the continuation.
    """

    value: float
    error: float
    exact: bool
    tokens: int


@dataclass(frozen=True)
class _MaskSample:
    """Positions of a block to mask together, and the weight of their summed -log p in the block's estimate."""

    start: int
    stop: int
    masked: tuple[int, ...]
    weight: float


class LikelihoodEstimator:
    """Scores continuations one at a time; whole blocks that a text shares with the previous one are not computed again.

    Args:
        model: diffusion or autoregressive.
        samples: mask samples per block, at least 2.
        block_size: the model's where None.
        seed: of the mask samples, which otherwise depend on the tokens only.
        max_num_batched_tokens: most tokens of a forward.

    Attributes:
        forwards: number of the model's forwards so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        samples: int = 16,
        block_size: int | None = None,
        seed: int = 0,
        max_num_batched_tokens: int = 512,
    ) -> None:
        if samples < 2:
            raise ConfigError(f"samples is {samples}; it must be at least 2, for a standard error")
        self._backend, self._config = model.backend(), model.config
        self._mask_id, self._samples, self._seed = model.config.mask_id, samples, seed
        diffusion_size = model.config.block_size or BLOCK_SIZE if block_size is None else block_size
        self._block_size = 1 if self._mask_id is None else diffusion_size
        # Multiples of whole blocks, which a forward either computes in full or not at all.
        self._max_tokens = max(max_num_batched_tokens // self._block_size, 1) * self._block_size
        # A cache block holds one diffusion block: mask samples share the blocks before theirs, and spare blocks hold their own.
        self._num_blocks = -(-model.config.max_positions // self._block_size)
        spare = self._max_tokens // self._block_size
        self._kv_cache = self._backend.new_kv_cache(self._num_blocks + spare, self._block_size)
        self._clean: list[int] = []
        self.forwards = 0

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """Log-likelihood of `continuation` after `context`.

        Raises:
            RequestError: there is nothing to score, no context for an autoregressive model, or the model's context is exceeded.
        """
        ids = [*context, *continuation]
        if not continuation:
            raise RequestError("continuation is empty; give at least one token")
        if self._mask_id is None and not context:
            raise RequestError("context is empty; an autoregressive model needs a token before the continuation")
        if len(ids) > self._config.max_positions:
            raise RequestError(f"{len(ids)} tokens to score exceed the context of {self._config.max_positions}; shorten them")
        if self._mask_id is None:
            return Likelihood(self._causal(ids, len(context)), 0.0, True, len(continuation))
        blocks = list(self._blocks(ids, len(context)))
        self._extend_clean(ids, (len(ids) - 1) // self._block_size * self._block_size)
        flat, fitting = [sample for samples, _ in blocks for sample in samples], self._max_tokens // self._block_size
        # As many samples to a forward as fit.
        losses = iter([loss for i in range(0, len(flat), fitting) for loss in self._losses(ids, flat[i : i + fitting])])
        total = variance = 0.0
        for samples, exact in blocks:
            values = [next(losses) for _ in samples]
            total += sum(values)
            if not exact:
                variance += statistics.variance(values) * len(values)
        return Likelihood(-total, math.sqrt(variance), all(exact for _, exact in blocks), len(continuation))

    def _blocks(self, ids: Sequence[int], first: int) -> Iterator[tuple[list[_MaskSample], bool]]:
        """Mask samples of every block with positions to score, weighted so that their losses sum to the block's estimate."""
        rng, size, count = random.Random(f"{self._seed} {first} {ids}"), self._block_size, self._samples
        for start in range(first // size * size, len(ids), size):
            stop = min(start + size, len(ids))
            positions = range(max(start, first), stop)
            m = len(positions)
            if 2**m - 1 <= count:
                subsets = (s for k in range(1, m + 1) for s in itertools.combinations(positions, k))
                yield [_MaskSample(start, stop, s, 1 / (len(s) * math.comb(m, len(s)))) for s in subsets], True
                continue
            # The j-th sample takes k from the j-th of `count` equal parts of 1..m.
            sizes = [1 + int(m * (j + rng.random()) / count) for j in range(count)]
            yield [_MaskSample(start, stop, tuple(rng.sample(positions, k)), m / k / count) for k in sizes], False

    def _losses(self, ids: Sequence[int], samples: Sequence[_MaskSample]) -> list[float]:
        """Weighted -log p of the masked positions of each sample, in one forward."""
        assert self._mask_id is not None
        slices, rows, targets, offset = list[SequenceSlice](), [], [], 0
        for sample in samples:
            first = max(sample.start - 1, 0)  # a shifted model reads the token before the block, too
            noisy = [self._mask_id if p in sample.masked else ids[p] for p in range(first, sample.stop)]
            tokens = self._config.inputs(noisy, sample.start - first, sample.stop - first)
            block_table = [*range(sample.start // self._block_size), self._num_blocks + len(slices)]
            slices.append(SequenceSlice(tokens, sample.start, block_table, self._block_size))
            rows += [offset + p - sample.start for p in sample.masked]
            targets += [ids[p] for p in sample.masked]
            offset += len(tokens)
        hidden_TD = self._forward(slices)
        log_probabilities = iter(self._log_probabilities(hidden_TD[rows], targets))
        return [-sample.weight * sum(next(log_probabilities) for _ in sample.masked) for sample in samples]

    def _log_probabilities(self, hidden_ND: Tensor, targets: Sequence[int]) -> list[float]:
        logits_NV = self._backend.logits(hidden_ND).float()
        if self._mask_id is not None:
            logits_NV = ban_mask(logits_NV, self._mask_id)
        targets_N1 = torch.tensor(targets, device=logits_NV.device)[:, None]
        chosen_N1: Tensor = logits_NV.log_softmax(-1).gather(1, targets_N1)
        return [float(value) for value in chosen_N1[:, 0]]

    def _extend_clean(self, ids: Sequence[int], stop: int) -> None:
        """Write keys and values of `ids[:stop]` (whole blocks) to the KV cache, from the first block that differs."""
        same = next((i for i, (a, b) in enumerate(zip(self._clean, ids[:stop], strict=False)) if a != b), None)
        start = (min(len(self._clean), stop) if same is None else same) // self._block_size * self._block_size
        for position in range(start, stop, self._max_tokens):
            self._forward_clean(ids, position, min(position + self._max_tokens, stop))
        self._clean = list(ids[:stop])

    def _forward_clean(self, ids: Sequence[int], start: int, stop: int) -> Tensor:
        causal_end = stop if self._config.shifted else 0
        block_table = range(-(-stop // self._block_size))
        tokens = self._config.inputs(ids, start, stop)
        return self._forward([SequenceSlice(tokens, start, block_table, self._block_size, causal_end)])

    def _forward(self, slices: Sequence[SequenceSlice]) -> Tensor:
        self.forwards += 1
        return self._backend.forward(Batch(slices, self._block_size, self._backend.device), self._kv_cache)

    def _causal(self, ids: Sequence[int], first: int) -> float:
        """Sum of next-token log-probabilities."""
        self._extend_clean(ids, first - 1)
        total = 0.0
        for start in range(first - 1, len(ids) - 1, self._max_tokens):
            stop = min(start + self._max_tokens, len(ids) - 1)
            hidden_TD = self._forward_clean(ids, start, stop)
            total += sum(self._log_probabilities(hidden_TD, ids[start + 1 : stop + 1]))
        return total
