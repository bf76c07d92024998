"""How likely a model finds a continuation: exactly for an autoregressive model, as a bound for a diffusion one.

Owns the low-variance estimator of the NELBO and how its forwards share what they have in common. Knows token ids only.

A block with `m` positions to score contributes `E_k E_S [(m / k) sum_{i in S} -log p(x_i | x but S)]`, with k
uniform in 1..m and S uniform among the subsets of size k. Where all 2^m - 1 subsets are no more than `samples`, the sum over
them is exact; elsewhere k is stratified over the samples, and the standard error is reported.

Source: LLaDA2.0 Eq. 5, in the fixed-count form of LLaDA (2502.09992) Eq. 6, per block.
Legend: L layers, G kv heads, P slots, S head dim, N queried rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import random
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
    """Of a continuation, in nats.

    Attributes:
        value: log-likelihood, or for a diffusion model its estimated lower bound, -NELBO.
        error: standard error of the estimate; 0 where it is exact.
        exact: nothing was sampled.
        tokens: of the continuation.
    """

    value: float
    error: float
    exact: bool
    tokens: int


@dataclass(frozen=True)
class _Draw:
    """Positions of a block to mask together, and what their summed -log p counts in the block's estimate."""

    start: int
    stop: int
    masked: tuple[int, ...]
    weight: float


class LikelihoodEstimator:
    """Scores continuations one after the other; whole blocks shared with the text before are not computed again.

    Args:
        model: diffusion or autoregressive.
        samples: draws per block, at least 2.
        block_size: default: the model's.
        seed: of the draws, which also depend on the tokens, and on nothing else.
        max_num_batched_tokens: most rows of a forward.

    Attributes:
        forwards: of the model so far.
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
        self._backend, self._config = model.backend(wait=True), model.config
        self._mask_id, self._samples, self._seed = model.config.mask_id, samples, seed
        wanted = model.config.block_size or BLOCK_SIZE if block_size is None else block_size
        self._block_size = 1 if self._mask_id is None else wanted
        self._max_rows = max(max_num_batched_tokens, self._block_size)
        # One diffusion block a cache block, so that draws of a block share those before it; behind them a draw's own.
        self._num_blocks = -(-model.config.max_positions // self._block_size)
        spare = self._max_rows // self._block_size
        self._kv_cache = self._backend.new_kv_cache(self._num_blocks + spare, self._block_size)
        self._clean: list[int] = []
        self.forwards = 0

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """Log-likelihood of `continuation` behind `context`.

        Raises:
            RequestError: nothing to score, no context for an autoregressive model, or more than the model's context holds.
        """
        ids = [*context, *continuation]
        if not continuation or (self._mask_id is None and not context):
            raise RequestError("there is nothing to score, or nothing before it for an autoregressive model to read")
        if len(ids) > self._config.max_positions:
            raise RequestError(f"{len(ids)} tokens to score exceed the context of {self._config.max_positions}; shorten them")
        if self._mask_id is None:
            return Likelihood(self._causal(ids, len(context)), 0.0, True, len(continuation))
        blocks = list(self._blocks(ids, len(context)))
        self._extend_clean(ids, (len(ids) - 1) // self._block_size * self._block_size)
        losses = iter(self._losses(ids, [draw for draws, _ in blocks for draw in draws]))
        total = variance = 0.0
        for draws, exact in blocks:
            found = [next(losses) for _ in draws]
            total += sum(found)
            if not exact:
                mean = sum(found) / len(found)
                variance += sum((loss - mean) ** 2 for loss in found) * len(found) / (len(found) - 1)
        return Likelihood(-total, math.sqrt(variance), all(exact for _, exact in blocks), len(continuation))

    def _blocks(self, ids: Sequence[int], first: int) -> Iterator[tuple[list[_Draw], bool]]:
        """The draws of every block with positions to score, weighted so that their losses sum to the block's estimate."""
        drawn, size, count = random.Random(f"{self._seed} {first} {ids}"), self._block_size, self._samples
        for start in range(first // size * size, len(ids), size):
            stop = min(start + size, len(ids))
            places = range(max(start, first), stop)
            m = len(places)
            if 2**m - 1 <= count:
                subsets = (s for k in range(1, m + 1) for s in itertools.combinations(places, k))
                yield [_Draw(start, stop, s, 1 / (len(s) * math.comb(m, len(s)))) for s in subsets], True
                continue
            # The j-th draw takes k from the j-th of `count` equal parts of 1..m.
            sizes = [1 + int(m * (j + drawn.random()) / count) for j in range(count)]
            yield [_Draw(start, stop, tuple(drawn.sample(places, k)), m / k / count) for k in sizes], False

    def _losses(self, ids: Sequence[int], draws: Sequence[_Draw]) -> Iterator[float]:
        """Weighted -log p of every draw's masked positions, as many draws to a forward as fit."""
        while draws:
            fitting = self._max_rows // self._block_size
            now, draws = draws[:fitting], draws[fitting:]
            yield from self._losses_of(ids, now)

    def _losses_of(self, ids: Sequence[int], draws: Sequence[_Draw]) -> list[float]:
        assert self._mask_id is not None
        slices, rows, targets, offset = list[SequenceSlice](), [], [], 0
        for draw in draws:
            first = max(draw.start - 1, 0)  # a shifted model reads the token before the block, too
            noisy = [self._mask_id if p in draw.masked else ids[p] for p in range(first, draw.stop)]
            tokens = self._config.inputs(noisy, draw.start - first, draw.stop - first)
            block_table = [*range(draw.start // self._block_size), self._num_blocks + len(slices)]
            slices.append(SequenceSlice(tokens, draw.start, block_table, self._block_size))
            rows += [offset + p - draw.start for p in draw.masked]
            targets += [ids[p] for p in draw.masked]
            offset += len(tokens)
        hidden_TD = self._forward(slices)
        found = iter(self._log_probabilities(hidden_TD[rows], targets))
        return [-draw.weight * sum(next(found) for _ in draw.masked) for draw in draws]

    def _log_probabilities(self, hidden_ND: Tensor, targets: Sequence[int]) -> list[float]:
        logits_NV = self._backend.logits(hidden_ND).float()
        if self._mask_id is not None:
            logits_NV = ban_mask(logits_NV, self._mask_id)
        wanted_N1 = torch.tensor(targets, device=logits_NV.device)[:, None]
        chosen_N1: Tensor = logits_NV.log_softmax(-1).gather(1, wanted_N1)
        return [float(value) for value in chosen_N1[:, 0]]

    def _extend_clean(self, ids: Sequence[int], stop: int) -> None:
        """Keys and values of `ids[:stop]` (whole blocks) into the KV cache, from where they differ from those there."""
        same = next((i for i, (a, b) in enumerate(zip(self._clean, ids[:stop], strict=False)) if a != b), None)
        start = (min(len(self._clean), stop) if same is None else same) // self._block_size * self._block_size
        for place in range(start, stop, self._max_rows // self._block_size * self._block_size):
            self._forward_clean(ids, place, min(place + self._max_rows // self._block_size * self._block_size, stop))
        self._clean = list(ids[:stop])

    def _forward_clean(self, ids: Sequence[int], start: int, stop: int) -> Tensor:
        causal_end = stop if self._config.shifted else 0
        block_table = range(-(-stop // self._block_size))
        tokens = self._config.inputs(ids, start, stop)
        return self._forward([SequenceSlice(tokens, start, block_table, self._block_size, causal_end)])

    def _forward(self, slices: Sequence[SequenceSlice]) -> Tensor:
        self.forwards += 1
        return self._backend.forward(Batch.build(slices, self._block_size, self._backend.device), self._kv_cache)

    def _causal(self, ids: Sequence[int], first: int) -> float:
        """The sum of next-token log-probabilities."""
        self._extend_clean(ids, first - 1)
        total = 0.0
        for start in range(first - 1, len(ids) - 1, self._max_rows):
            stop = min(start + self._max_rows, len(ids) - 1)
            hidden_TD = self._forward_clean(ids, start, stop)
            total += sum(self._log_probabilities(hidden_TD, ids[start + 1 : stop + 1]))
        return total
