"""Cached block-diffusion decoding of one sequence: prefill, denoise, fused commit.

Owns the order of forwards. The decision rule is `diffusion.decode`; the result equals `reference.generate_reference`.

Legend: B the block size, T tokens of a forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from unmask.diffusion.blocks import num_blocks
from unmask.diffusion.decode import DecodeRules, accept, candidates, step_quota
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.cache import KVCache
from unmask.engine.completion import Completion, OnStep, Prompt, Step, finish
from unmask.models.transformer import Transformer


@dataclass
class _Block:
    """The block being denoised. What is decided is explicit state: a prompt may hold the mask token literally."""

    start: int
    tokens_B: Tensor
    undecided_B: Tensor
    fixed: int
    step: int = 0
    guess_B: list[int | None] = field(default_factory=list)

    @classmethod
    def open(cls, start: int, prefix: tuple[int, ...], size: int, mask_id: int, device: torch.device) -> _Block:
        tokens = torch.full((size,), mask_id, dtype=torch.int64)
        tokens[: len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
        undecided = torch.arange(size) >= len(prefix)
        return cls(start, tokens.to(device), undecided.to(device), len(prefix))

    def decide(self, logits_NV: Tensor, rules: DecodeRules, mask_id: int) -> Step:
        """Apply one denoising step to the undecided positions; returns what happened (`forwards` still 0)."""
        where_N = torch.nonzero(self.undecided_B)[:, 0]
        token_N, confidence_N = candidates(logits_NV, where_N + self.start, self.step, rules, mask_id)
        every_N = torch.ones_like(where_N, dtype=torch.bool)
        chosen_N = accept(confidence_N, every_N, rules.threshold, step_quota(self.step, rules))
        self.tokens_B[where_N[chosen_N]] = token_N[chosen_N]
        self.undecided_B[where_N[chosen_N]] = False
        self.step += 1
        return self._report(where_N.tolist(), token_N.tolist(), chosen_N.tolist())

    def _report(self, where: list[int], token: list[int], chosen: list[bool]) -> Step:
        guess: list[int | None] = [None] * len(self.tokens_B)
        accepted = [False] * len(self.tokens_B)
        for position, candidate, taken in zip(where, token, chosen, strict=True):
            guess[position], accepted[position] = candidate, taken
        pairs = zip(self.tokens_B.tolist(), self.undecided_B.tolist(), strict=True)
        tokens = tuple(None if undecided else value for value, undecided in pairs)
        return Step(self.start, self.fixed, tokens, tuple(guess), tuple(accepted), 0)

    def decided_prefix(self) -> list[int]:
        """New tokens of this block with nothing undecided to their left."""
        undecided = torch.nonzero(self.undecided_B)[:, 0]
        end = int(undecided[0]) if len(undecided) else len(self.tokens_B)
        prefix: list[int] = self.tokens_B[self.fixed : end].tolist()
        return prefix


class BlockwiseDecoder:
    """Decodes one prompt; `forwards` counts every call of the model."""

    def __init__(self, model: Transformer, prompt: Prompt, rules: DecodeRules, mask_id: int) -> None:
        prompt.check(model.config)
        self.model, self.prompt, self.rules, self.mask_id = model, prompt, rules, mask_id
        size = rules.block_size
        self.num_blocks = num_blocks(len(prompt.ids) + prompt.max_new_tokens, size)
        weight = model.embed.weight
        self.device = weight.device
        self.cache = KVCache(model.config, self.num_blocks * size, dtype=weight.dtype, device=self.device)
        self.forwards = 0

    def run(self, on_step: OnStep | None = None) -> Completion:
        """Decode to the end; `on_step` sees every denoising step.

        Source: LLaDA2.0 section 5. Departs: the commit pass of a finished block and the first pass of the next are one
        forward over `[block k | all-mask block k + 1]`, exact under the block-causal mask.
        """
        size, ids = self.rules.block_size, self.prompt.ids
        first = len(ids) // size
        self._prefill(ids[: first * size])
        finished: Tensor | None = None
        done: list[int] = []
        for number in range(first, self.num_blocks):
            prefix = ids[first * size :] if number == first else ()
            block = _Block.open(number * size, prefix, size, self.mask_id, self.device)
            while bool(block.undecided_B.any()):
                step = block.decide(self._logits(finished, block), self.rules, self.mask_id)
                finished = None
                if on_step is not None:
                    on_step(Step(step.start, step.fixed, step.tokens, step.guess, step.accepted, self.forwards))
                if self.prompt.eos_ids.intersection(block.decided_prefix()):
                    return finish(done + block.decided_prefix(), self.prompt, self.forwards)
            done += block.decided_prefix()
            finished = block.tokens_B
        return finish(done, self.prompt, self.forwards)

    def _prefill(self, ids: tuple[int, ...]) -> None:
        """Keys and values of all full prompt blocks in one forward, without logits."""
        if not ids:
            return
        mask = block_causal_mask(len(ids), len(ids), self.rules.block_size).to(self.device)
        self._forward(torch.tensor(ids, device=self.device), mask)
        self.cache.commit(len(ids))

    def _logits(self, finished: Tensor | None, block: _Block) -> Tensor:
        """Logits [N, V] at the undecided positions of `block`, committing the `finished` block before it on the way."""
        size = self.rules.block_size
        if finished is None:
            hidden = self._forward(block.tokens_B, None)
        else:
            keys = self.cache.length + 2 * size
            mask = block_causal_mask(2 * size, keys, size, start=self.cache.length).to(self.device)
            hidden = self._forward(torch.cat((finished, block.tokens_B)), mask)[size:]
            self.cache.commit(size)
        return self.model.head(hidden[block.undecided_B])

    def _forward(self, tokens_T: Tensor, mask_TK: Tensor | None) -> Tensor:
        """Hidden states [T, D] of tokens that follow the committed ones."""
        positions = torch.arange(len(tokens_T), device=self.device) + self.cache.length
        hidden = self.model(tokens_T[None], positions[None], self.cache.attend(mask_TK))
        self.forwards += 1
        out: Tensor = hidden[0]
        return out


@torch.inference_mode()
def generate_blockwise(
    model: Transformer, prompt: Prompt, rules: DecodeRules, mask_id: int, on_step: OnStep | None = None
) -> Completion:
    """Cached decoding of one prompt: `BlockwiseDecoder(...).run(on_step)` without gradients."""
    return BlockwiseDecoder(model, prompt, rules, mask_id).run(on_step)
