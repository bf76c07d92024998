"""`LanguageModel`: a transformer with its tokenizer, and the calls a user makes.

Owns the public Python interface. Knows how to choose a decoder; decoding itself is in `blockwise` and `autoregressive`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.diffusion.decode import DecodeRules
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.autoregressive import generate_autoregressive
from unmask.engine.blockwise import generate_blockwise
from unmask.engine.completion import Completion, FinishReason, OnStep, Prompt, check_vocabulary
from unmask.errors import RequestError
from unmask.models.attention import DenseAttend
from unmask.models.checkpoint import load_model
from unmask.models.config import ModelConfig
from unmask.models.dtypes import parse_dtype
from unmask.models.hub import resolve, tokenizer_folder
from unmask.models.transformer import Transformer

DEFAULT_BLOCK_SIZE = 32


@dataclass(frozen=True)
class Generation:
    """Completed text and what it cost. `tokens_per_forward` counts every forward, prefill and commit included."""

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    forwards: int
    tokens_per_forward: float
    seconds: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The fields that `unmask generate --json` prints."""
        values = asdict(self)
        del values["ids"]
        return values


class LanguageModel:
    """A model ready to generate; make one with `unmask.load`.

    Diffusion models (a `mask_id` in their config) decode block by block, others one token at a time. Calls keep no
    state between them and are deterministic: the same arguments give the same result.
    """

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer | None, *, name: str) -> None:
        self.transformer, self.tokenizer, self.name = transformer.eval(), tokenizer, name

    @property
    def config(self) -> ModelConfig:
        """The architecture and special token ids."""
        return self.transformer.config

    @property
    def is_diffusion(self) -> bool:
        """Whether the model decodes by denoising."""
        return self.config.mask_id is not None

    def encode_prompt(self, text: str, *, chat: bool | None = None) -> list[int]:
        """Ids of a prompt; through the chat template when there is one (`chat=False`: as plain text)."""
        tokenizer = self._need_tokenizer()
        if chat is None:
            chat = tokenizer.has_chat_template
        if not chat:
            return [*tokenizer.prefix_ids, *tokenizer.encode(text)]
        if not tokenizer.has_chat_template:
            raise RequestError(f"model {self.name} has no chat template; use plain text (--raw)")
        return tokenizer.chat([{"role": "user", "content": text}], add_generation_prompt=True)

    def generate(
        self, text: str, *, max_new_tokens: int = 256, chat: bool | None = None, on_step: OnStep | None = None, **options: Any
    ) -> Generation:
        """Answer `text`.

        Args:
            text: the user's message, or plain text to continue with `chat=False`.
            max_new_tokens: most tokens to generate.
            chat: use the tokenizer's chat template; default: if there is one.
            on_step: sees every denoising step.
            options: as of `generate_ids`.

        Returns:
            Text, counts and timing.

        Raises:
            RequestError: no tokenizer, an option out of range, or a prompt longer than the context.
        """
        tokenizer = self._need_tokenizer()
        ids = self.encode_prompt(text, chat=chat)
        started = time.perf_counter()
        completion = self.complete(ids, max_new_tokens=max_new_tokens, on_step=on_step, **options)
        seconds = time.perf_counter() - started
        count = len(completion.ids)
        return Generation(
            text=tokenizer.decode(completion.ids),
            ids=completion.ids,
            prompt_tokens=len(ids),
            completion_tokens=count,
            finish_reason=completion.finish_reason,
            forwards=completion.forwards,
            tokens_per_forward=count / completion.forwards,
            seconds=seconds,
            tokens_per_second=count / seconds,
        )

    def generate_ids(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 256,
        block_size: int | None = None,
        threshold: float = 0.95,
        steps: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        mask_id: int | None = None,
        eos_id: int | Sequence[int] | None = None,
    ) -> list[int]:
        """Complete token ids; works without a tokenizer.

        Args:
            ids: the prompt.
            max_new_tokens: most tokens to generate.
            block_size: tokens per diffusion block; default: the model's.
            threshold: a candidate is committed when its probability exceeds this.
            steps: most denoising steps per block; default: the block size.
            temperature: 0 is argmax.
            top_k: keep the k likeliest tokens when sampling; None: all.
            top_p: keep the smallest set of tokens with this mass when sampling; None: all.
            seed: of the sampling.
            mask_id: the mask token; default: the model's. Given for an autoregressive model, it decodes by denoising.
            eos_id: token or tokens that end the completion; default: the model's.

        Returns:
            The completion, up to and including the end-of-sequence token.

        Raises:
            RequestError: an option out of range, or a prompt longer than the context.
        """
        completion = self.complete(
            ids,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            threshold=threshold,
            steps=steps,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            mask_id=mask_id,
            eos_id=eos_id,
        )
        return list(completion.ids)

    def complete(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 256,
        block_size: int | None = None,
        steps: int | None = None,
        mask_id: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        on_step: OnStep | None = None,
        **rules: Any,
    ) -> Completion:
        """`generate_ids` with the finish reason and the number of forwards."""
        mask_id = self.config.mask_id if mask_id is None else mask_id
        if mask_id is not None and not 0 <= mask_id < self.config.vocab_size:
            raise RequestError(f"mask token {mask_id} is outside the vocabulary (0..{self.config.vocab_size - 1})")
        size = block_size if block_size is not None else self.config.block_size or DEFAULT_BLOCK_SIZE
        prompt = Prompt(tuple(ids), max_new_tokens, self._eos(eos_id))
        decode = DecodeRules(block_size=size, steps=size if steps is None else steps, **rules)
        if mask_id is None:
            return generate_autoregressive(self.transformer, prompt, decode, on_step)
        return generate_blockwise(self.transformer, prompt, decode, mask_id, on_step)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], *, block_size: int | None = None) -> Tensor:
        """Logits of a sequence under the block-causal mask.

        Args:
            ids: tokens, masks among them or not.
            block_size: tokens see their own block and those before it; default: the model's, or 1 (causal) if it has none.

        Returns:
            float32 [len(ids), vocab]. Row i predicts token i of a diffusion model, token i + 1 of an autoregressive one.

        Raises:
            RequestError: no ids, more than the context holds, or one outside the vocabulary.
        """
        check_vocabulary(ids, self.config)
        if not 0 < len(ids) <= self.config.max_positions:
            raise RequestError(f"{len(ids)} tokens given; logits need 1 to {self.config.max_positions}, the model's context")
        size = block_size if block_size is not None else self.config.block_size or 1
        if size < 1:
            raise RequestError(f"block size is {size}; it must be at least 1")
        device = self.transformer.embed.weight.device
        tokens = torch.tensor(ids, device=device)[None]
        mask = block_causal_mask(len(ids), len(ids), size).to(device)[None]
        hidden = self.transformer(tokens, torch.arange(len(ids), device=device)[None], DenseAttend(mask))
        out: Tensor = self.transformer.head(hidden)[0].float()
        return out

    def _eos(self, eos_id: int | Sequence[int] | None) -> frozenset[int]:
        if eos_id is None:
            return frozenset(self.config.eos_ids)
        return frozenset([eos_id] if isinstance(eos_id, int) else eos_id)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"model {self.name} has no tokenizer; use generate_ids, or add tokenizer.json to its folder")
        return self.tokenizer


def load(model: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> LanguageModel:
    """Load a model for generation.

    Args:
        model: a folder (of a model, or of an adapter), a Hugging Face id, or an embedded model (`smollm2-135m`,
            `smollm2-135m-diffusion`).
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto": bfloat16 where the device computes it natively.
        device: "cpu", "cuda", ...

    Returns:
        The model; its tokenizer is None when the folder has none.

    Raises:
        CheckpointError: unknown, incomplete or damaged model.
        ConfigError: unsupported architecture or dtype.
    """
    folder = resolve(str(model))
    transformer = load_model(folder, dtype=parse_dtype(dtype, device), device=device)
    source = tokenizer_folder(folder)
    return LanguageModel(transformer, None if source is None else load_tokenizer(source), name=str(model))
