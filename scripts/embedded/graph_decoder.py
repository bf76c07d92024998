"""Autoregressive decoding of some thousand sequences at once on a GPU: one CUDA graph a step, for writing training data.

A slot holds one sequence. Every step decodes one token of every slot, finished or not, in one graph; now and then finished
sequences are taken out and new ones prefilled in their place. The sequences are as they are needed for data: sampled from one
generator, so that a text depends on what else is decoded. The engine is for everything else. On a CPU the same runs without a
graph, slowly, for tests.

Legend: N slots, P prompt positions, C positions of a slot, L layers, G kv heads, R query heads of a kv head, S head dim,
V vocabulary, D hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import torch
from decoders import Decoded
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unmask.models.arch.transformer import Transformer

STEPS = 16
"""Steps between two looks at what has finished."""
PREFILL_TOKENS = 32_768
"""Positions, padding included, of one prefill."""


@dataclass(frozen=True)
class _Sequence:
    number: int
    ids: list[int]
    budget: int
    temperature: float


class GraphDecoder:
    """Decodes sequences in slots."""

    def __init__(self, model: Transformer, end_ids: Collection[int], *, num_slots: int, max_length: int, seed: int = 0) -> None:
        """Make room for everything, and record the graph.

        Args:
            model: an autoregressive one, in eval mode on its device.
            end_ids: tokens that end a sequence.
            num_slots: sequences decoded at once.
            max_length: of prompt and new tokens together.
            seed: of the sampling.
        """
        config, self._device = model.config, model.embed.weight.device
        self._model, self._max_length = model, max_length
        torch.manual_seed(seed)
        shape = (2, config.num_layers, num_slots, config.num_kv_heads, max_length, config.head_dim)
        self._cache = torch.zeros(shape, dtype=model.embed.weight.dtype, device=self._device)
        self._bias_N11C = torch.zeros(num_slots, 1, 1, max_length, dtype=self._cache.dtype, device=self._device)
        self._text_NC = self._zeros(num_slots, max_length)
        self._at_N = self._zeros(num_slots)  # of the token that is fed next
        self._stop_N = self._zeros(num_slots)
        self._done_N = self._zeros(num_slots) == 0
        self._temperature_N = torch.zeros(num_slots, device=self._device)
        self.end_ids = frozenset(end_ids)
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64, device=self._device)
        self._slots = torch.arange(num_slots, device=self._device)
        self._running: dict[int, _Sequence] = {}
        self._free = list(range(num_slots))
        self._waiting: deque[_Sequence] = deque()
        self._added = 0
        self._graph = self._record() if self._device.type == "cuda" else None

    @property
    def room(self) -> int:
        """Sequences that may still be added: so many wait that no slot stays empty."""
        return len(self._slots) * 5 // 4 - len(self._running) - len(self._waiting)

    def add(self, ids: list[int], *, budget: int, temperature: float, seed: int) -> int:
        """Queue a sequence, with what a slot holds of its budget (ValueError: nothing); `seed` is not used."""
        budget = min(budget, self._max_length - len(ids))
        if not ids or budget < 1:
            raise ValueError(f"{len(ids)} tokens; a slot holds 1 to {self._max_length - 1} of a prompt")
        self._added += 1
        self._waiting.append(_Sequence(self._added, ids, budget, temperature))
        return self._added

    @torch.inference_mode()
    def step(self) -> list[Decoded]:
        """Take out what has finished, prefill what waits, start some steps.

        On a GPU the steps are still running when this returns: what the caller does meanwhile costs nothing.
        """
        decoded = self._collect()
        while self._free and self._waiting:
            self._prefill(self._next_batch())
        for _ in range(STEPS if self._running else 0):
            self._graph.replay() if self._graph is not None else self._decode()
        return decoded

    def _collect(self) -> list[Decoded]:
        done_N = self._done_N.cpu()
        slots = [slot for slot in self._running if done_N[slot]]
        if not slots:
            return []
        at = torch.tensor(slots, device=self._device)
        ends, texts = self._at_N[at].tolist(), self._text_NC[at].cpu()
        decoded = []
        for slot, end, text in zip(slots, ends, texts, strict=True):
            sequence = self._running.pop(slot)
            ids = text[len(sequence.ids) : end + 1].tolist()
            ended = ids[-1] in self.end_ids
            decoded.append(Decoded(sequence.number, ids, ended))
            self._free.append(slot)
        return decoded

    def _next_batch(self) -> list[_Sequence]:
        batch: list[_Sequence] = []
        longest = 0
        while self._waiting and len(batch) < len(self._free):
            longest = max(longest, len(self._waiting[0].ids))
            if batch and longest * (len(batch) + 1) > PREFILL_TOKENS:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _prefill(self, batch: list[_Sequence]) -> None:
        slots = torch.tensor([self._free.pop() for _ in batch], device=self._device)
        lengths = torch.tensor([len(each.ids) for each in batch])
        tokens_NP = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for row, each in zip(tokens_NP, batch, strict=True):
            row[: len(each.ids)] = torch.tensor(each.ids)
        tokens_NP, lengths_N = tokens_NP.to(self._device), lengths.to(self._device)
        length = tokens_NP.shape[1]

        def attend(layer: int, q_NHPS: Tensor, k_NGPS: Tensor, v_NGPS: Tensor) -> Tensor:
            # What padding leaves behind is overwritten before it is seen.
            self._cache[0, layer, slots, :, :length] = k_NGPS
            self._cache[1, layer, slots, :, :length] = v_NGPS
            return scaled_dot_product_attention(q_NHPS, k_NGPS, v_NGPS, is_causal=True, enable_gqa=True)

        self._model(tokens_NP, torch.arange(length, device=self._device).expand(len(batch), -1), attend)
        self._text_NC[slots, :length] = tokens_NP
        self._at_N[slots] = lengths_N - 1
        self._stop_N[slots] = lengths_N - 1 + torch.tensor([each.budget for each in batch], device=self._device)
        self._temperature_N[slots] = torch.tensor([each.temperature for each in batch], device=self._device)
        self._done_N[slots] = False
        self._running |= dict(zip(slots.tolist(), batch, strict=True))

    def _record(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._decode()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._decode()
        return graph

    def _decode(self) -> None:
        """One token of every slot that is not done, in place."""
        at_N, slots = self._at_N, self._slots
        hidden_NC = torch.arange(self._max_length, device=self._device) > at_N[:, None]
        self._bias_N11C.copy_(torch.where(hidden_NC, float("-inf"), 0.0)[:, None, None])
        hidden_N1D = self._model(self._text_NC[slots, at_N][:, None], at_N[:, None], self._attend)
        logits_NV = self._model.head(hidden_N1D[:, 0]).float()
        noise_NV = torch.empty_like(logits_NV).exponential_().log_().neg_()  # Gumbel: its argmax samples
        noise_NV.mul_(self._temperature_N[:, None])
        token_N = (logits_NV + noise_NV).argmax(-1)
        going_N = ~self._done_N
        next_N = torch.where(going_N, at_N + 1, at_N)
        self._text_NC[slots, next_N] = torch.where(going_N, token_N, self._text_NC[slots, next_N])
        self._done_N |= going_N & (torch.isin(token_N, self._end_ids) | (next_N >= self._stop_N))
        at_N.copy_(next_N)

    def _attend(self, layer: int, q_NHPS: Tensor, k_NGPS: Tensor, v_NGPS: Tensor) -> Tensor:
        keys, values = self._cache[0, layer], self._cache[1, layer]
        keys[self._slots, :, self._at_N] = k_NGPS[:, :, 0]
        values[self._slots, :, self._at_N] = v_NGPS[:, :, 0]
        # Heads that share keys are queries side by side: one pass over the keys.
        q_NGRS = q_NHPS[:, :, 0].unflatten(1, (k_NGPS.shape[1], -1))
        bias = self._bias_N11C.expand(-1, -1, q_NGRS.shape[2], -1)
        out_NGRS = scaled_dot_product_attention(q_NGRS, keys, values, attn_mask=bias)
        return out_NGRS.flatten(1, 2)[:, :, None]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)
