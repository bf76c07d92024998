"""`LanguageModel`: a transformer with its tokenizer, and the calls a user makes.

Owns the public Python interface: text in, text out. Decoding itself is `engine.engine`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.data.chat import Message
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.diffusion.decode import PRESETS, DecodeRules
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.backends.native import QuantizedModel
from unmask.engine.engine import Engine
from unmask.engine.grammar import Grammar, GrammarCompiler
from unmask.engine.infill import Infilling, best_filling, filling_requests, split_holes
from unmask.engine.request import Completion, Costs, FinishReason, OnStep, Request, Step, TokenLogprob, check_vocabulary
from unmask.engine.runner import Backend, TorchBackend
from unmask.engine.sequences.speculative import choose_speculative
from unmask.errors import RequestError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.dtypes import parse_dtype
from unmask.models.weights.hub import resolve, tokenizer_folder
from unmask.models.weights.loading import load_model

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
    costs: Costs
    logprobs: tuple[TokenLogprob, ...] | None = None
    trace: tuple[Step, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields that `unmask generate --json` prints."""
        values = asdict(replace(self, trace=()))
        for name in ("ids", "trace", *(["logprobs"] if self.logprobs is None else [])):
            del values[name]
        return values


class LanguageModel:
    """A model ready to generate; make one with `unmask.load`.

    Diffusion models (a `mask_id` in their config) decode block by block, others one token at a time. Calls keep no
    state between them and are deterministic: the same arguments give the same result.

    Args:
        transformer: the weights.
        tokenizer: None: only calls that take and give ids work.
        name: what to call it in messages.
        quantize: "int8" or "int4": decode with quantised weights on the CPU; "auto": int8 where that works; None: with the
            weights as they are.
    """

    def __init__(
        self, transformer: Transformer, tokenizer: Tokenizer | None, *, name: str, quantize: str | None = None
    ) -> None:
        self.transformer, self.tokenizer, self.name = transformer.eval(), tokenizer, name
        if tokenizer is not None and self.config.start_id is not None:
            tokenizer.set_start_token(self.config.start_id)
        self._quantized = QuantizedModel.choose(self.transformer, quantize)

    @property
    def config(self) -> ModelConfig:
        """The architecture and special token ids."""
        return self.transformer.config

    @property
    def is_diffusion(self) -> bool:
        """Whether the model decodes by denoising."""
        return self.config.mask_id is not None

    def backend(self, *, wait: bool = False) -> Backend:
        """What computes the forward passes; with quantised weights, `wait` lets the kernels be compiled first."""
        return TorchBackend(self.transformer) if self._quantized is None else self._quantized.current(wait=wait)

    def engine(self, *, mask_id: int | None = None, **options: Any) -> Engine:
        """An engine of this model for many requests at a time; options as of `Engine`."""
        decode = None if self.tokenizer is None else self.tokenizer.decode
        return Engine(self.backend(), mask_id=mask_id, decode=decode, **options)

    def encode_prompt(self, text: str, *, chat: bool | None = None) -> list[int]:
        """Ids of a prompt; through the chat template when there is one (`chat=False`: as plain text)."""
        tokenizer = self._need_tokenizer()
        if chat is None:
            chat = tokenizer.has_chat_template
        if not chat:
            return [*tokenizer.prefix_ids, *tokenizer.encode(text)]
        return self.encode_chat([{"role": "user", "content": text}])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, laid out for an answer."""
        tokenizer = self._need_tokenizer()
        if not tokenizer.has_chat_template:
            raise RequestError(f"model {self.name} has no chat template; use plain text (--raw)")
        return tokenizer.chat(messages, add_generation_prompt=True)

    def generate(
        self, text: str, *, max_new_tokens: int = 256, chat: bool | None = None, on_step: OnStep | None = None, **options: Any
    ) -> Generation:
        """Answer `text`.

        Args:
            text: the user's message, or plain text to continue with `chat=False`.
            max_new_tokens: most tokens to generate.
            chat: use the tokenizer's chat template; default: if there is one.
            on_step: sees every denoising step.
            options: as of `request`.

        Returns:
            Text, counts and timing.

        Raises:
            RequestError: no tokenizer, an option out of range, or a prompt longer than the context.
        """
        self._need_tokenizer()
        ids = self.encode_prompt(text, chat=chat)
        started = time.perf_counter()
        completion = self.complete(ids, max_new_tokens=max_new_tokens, on_step=on_step, **options)
        return self._as_generation(len(ids), completion, time.perf_counter() - started)

    def generate_batch(
        self, texts: Sequence[str], *, max_new_tokens: int = 256, chat: bool | None = None, **options: Any
    ) -> list[Generation]:
        """Answer many texts at once, each exactly as `generate` would, sharing forwards; `seconds` are those of the batch."""
        self._need_tokenizer()
        mask_id = options.pop("mask_id", None)
        prompts = [self.encode_prompt(text, chat=chat) for text in texts]
        requests = [self.request(ids, max_new_tokens=max_new_tokens, **options) for ids in prompts]
        started = time.perf_counter()
        completions = self.engine(mask_id=mask_id).run(requests)
        seconds = time.perf_counter() - started
        return [self._as_generation(len(ids), each, seconds) for ids, each in zip(prompts, completions, strict=True)]

    def infill(
        self,
        text: str,
        *,
        hole: str = "___",
        tokens: int | tuple[int, int] = 8,
        block_size: int | None = None,
        **options: Any,
    ) -> Infilling:
        """Fill the holes of a text, with what stands on both sides of each in view.

        Args:
            text: with one or more holes; a space before a hole is part of what is filled in.
            hole: how a hole is written.
            tokens: tokens of each hole; a range (least, most) tries every length and keeps the likeliest filling.
            block_size: default: one block over the whole text, so that every hole sees all of it.
            options: as of `request`.

        Returns:
            The filled text, what went into each hole, and what it cost.

        Raises:
            RequestError: no hole, an autoregressive model, an option out of range, or a text longer than the context.
        """
        tokenizer = self._need_tokenizer()
        parts = split_holes(text, hole)
        mask_id = options.pop("mask_id", None)
        template = self.request((None,), max_new_tokens=1, block_size=block_size, **options)  # a hole: not verified
        started = time.perf_counter()
        requests = filling_requests(template, parts, tokens, tokenizer, whole=block_size is None)
        completions = self.engine(mask_id=mask_id, prefix_cache=False).run(requests)
        return best_filling(requests, completions, tokenizer, time.perf_counter() - started)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles JSON schemas, regular expressions and Lark grammars for this model."""
        return GrammarCompiler(self._need_tokenizer(), self.config.eos_ids, self.config.vocab_size)

    def generate_ids(self, ids: Sequence[int | None], *, max_new_tokens: int = 256, **options: Any) -> list[int]:
        """Complete token ids; works without a tokenizer.

        Args:
            ids: the prompt; None is a hole, filled too and given first.
            max_new_tokens: most tokens to generate.
            options: as of `request`, and `mask_id`: the mask token; default: the model's. Given for an autoregressive
                model, it decodes by denoising.

        Returns:
            The completion, up to and including the end-of-sequence token.

        Raises:
            RequestError: an option out of range, or a prompt longer than the context.
        """
        return list(self.complete(ids, max_new_tokens=max_new_tokens, **options).ids)

    def complete(
        self,
        ids: Sequence[int | None],
        *,
        max_new_tokens: int = 256,
        mask_id: int | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Completion:
        """`generate_ids` with the finish reason and the costs; `on_step` sees every denoising step."""
        request = self.request(ids, max_new_tokens=max_new_tokens, **options)
        request.check(self.config)
        engine = self.engine(mask_id=mask_id, num_tokens=request.canvas_length + request.rules.block_size, prefix_cache=False)
        for update in engine.stream(request, watch=on_step is not None):
            if on_step is not None and update.step is not None:
                on_step(update.step)
            if update.completion is not None:
                return update.completion
        raise AssertionError("a stream ends with a completion")

    def request(
        self,
        ids: Sequence[int | None],
        *,
        max_new_tokens: int = 256,
        eos_id: int | Sequence[int] | None = None,
        block_size: int | None = None,
        steps: int | None = None,
        preset: str | None = None,
        json_schema: Mapping[str, Any] | str | bool | None = None,
        regex: str | None = None,
        grammar: Grammar | str | None = None,
        stop: str | Sequence[str] = (),
        verify: bool | None = None,
        **options: Any,
    ) -> Request:
        """A request for this model's engine.

        Args:
            ids: the prompt; None is a hole to fill.
            max_new_tokens: most tokens to generate.
            eos_id: token or tokens that end the completion; default: the model's.
            block_size: tokens per diffusion block; default: the model's.
            steps: most denoising steps per block; default: the block size.
            preset: "speed" or "quality": LLaDA2.1's settings with editing.
            json_schema: the completion is JSON that this schema accepts.
            regex: the completion matches this regular expression.
            grammar: the completion is a sentence of this Lark grammar, or compiled grammar.
            stop: string or strings that end the completion.
            verify: check drafts, so that the text is that of decoding token by token; default: where that is possible (a
                shifted model, no holes, no edits).
            options: fields of `Request` (min_new_tokens, logit_bias, logprobs, sample, priority, trace) and of `DecodeRules`
                (threshold, temperature, top_k, top_p, seed, policy, entropy_bound, edit_threshold, max_post_steps, window).

        Raises:
            RequestError: an option out of range or unknown, or a grammar that does not compile.
        """
        size = block_size if block_size is not None else self.config.block_size or DEFAULT_BLOCK_SIZE
        if preset is not None and preset not in PRESETS:
            raise RequestError(f"preset is {preset!r}; use one of {', '.join(PRESETS)}")
        known = {name: options.pop(name) for name in _REQUEST_OPTIONS & options.keys()}
        unknown = options.keys() - _RULE_OPTIONS
        if unknown:
            raise RequestError(
                f"unknown option {min(unknown)}; use one of {', '.join(sorted(_REQUEST_OPTIONS | _RULE_OPTIONS))}"
            )
        chosen = {} if preset is None else PRESETS[preset]
        rules = DecodeRules(block_size=size, steps=size if steps is None else steps, **{**chosen, **options})
        request = Request(
            ids=tuple(ids),
            max_new_tokens=max_new_tokens,
            eos_ids=self._eos(eos_id),
            rules=rules,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            grammar=self._grammar(json_schema, regex, grammar),
            **known,
        )
        return choose_speculative(request, self.config, verify, options.get("threshold"))

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], *, block_size: int | None = None) -> Tensor:
        """Logits of a sequence under the block-causal mask.

        Args:
            ids: tokens, masks among them or not.
            block_size: tokens see their own block and those before it; default: the model's, or 1 (causal) if it has none.

        Returns:
            float32 [len(ids), vocab]. Row i predicts token i of a diffusion model, token i + 1 of an autoregressive one. A
            shifted model reads all but the last block causally, and its last id is seen by no row.

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
        tokens = torch.tensor(self.config.inputs(ids, 0, len(ids)), device=device)[None]
        context = (len(ids) - 1) // size * size if self.config.shifted else 0
        mask = block_causal_mask(len(ids), len(ids), size, context=context).to(device)[None]
        positions = torch.arange(len(ids), device=device)[None]
        hidden = self.transformer(tokens, positions, DenseAttend(mask), noisy_BT=positions >= context)
        out: Tensor = self.transformer.head(hidden)[0].float()
        return out

    def _eos(self, eos_id: int | Sequence[int] | None) -> frozenset[int]:
        if eos_id is None:
            return frozenset(self.config.eos_ids)
        return frozenset([eos_id] if isinstance(eos_id, int) else eos_id)

    def _grammar(
        self, json_schema: Mapping[str, Any] | str | bool | None, regex: str | None, grammar: Grammar | str | None
    ) -> Grammar | None:
        given = [name for name, v in (("json_schema", json_schema), ("regex", regex), ("grammar", grammar)) if v is not None]
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} are both given; a completion follows one of them")
        if json_schema is not None:
            return self.grammars.json_schema(json_schema)
        if regex is not None:
            return self.grammars.regex(regex)
        return self.grammars.lark(grammar) if isinstance(grammar, str) else grammar

    def _as_generation(self, prompt_tokens: int, completion: Completion, seconds: float) -> Generation:
        count = len(completion.ids)
        return Generation(
            text=self._need_tokenizer().decode(completion.ids) if completion.text is None else completion.text,
            ids=completion.ids,
            prompt_tokens=prompt_tokens,
            completion_tokens=count,
            finish_reason=completion.finish_reason,
            forwards=completion.forwards,
            tokens_per_forward=count / max(completion.forwards, 1),
            seconds=seconds,
            tokens_per_second=count / seconds,
            costs=completion.costs,
            logprobs=completion.logprobs,
            trace=completion.trace,
        )

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"model {self.name} has no tokenizer; use generate_ids, or add tokenizer.json to its folder")
        return self.tokenizer


_REQUEST_OPTIONS = frozenset({"min_new_tokens", "logit_bias", "logprobs", "sample", "priority", "trace"})
_RULE_OPTIONS = frozenset(DecodeRules.__dataclass_fields__) - {"block_size", "steps", "verify"}


def load(
    model: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu", quantize: str | None = None
) -> LanguageModel:
    """Load a model for generation.

    Args:
        model: a folder (of a model, or of an adapter), a Hugging Face id, or an embedded model (`smollm2-135m`,
            `smollm2-135m-diffusion`, `smollm2-135m-converted`).
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto": bfloat16 where the device computes it natively.
        device: "cpu", "cuda", ...
        quantize: "int8" or "int4": decode with quantised weights (dense models on the CPU); "auto": int8 where that works;
            `logits` keeps the loaded ones.

    Returns:
        The model; its tokenizer is None when the folder has none.

    Raises:
        CheckpointError: unknown, incomplete or damaged model.
        ConfigError: unsupported architecture, dtype or quantisation.
    """
    folder = resolve(str(model))
    transformer = load_model(folder, dtype=parse_dtype(dtype, device), device=device)
    source = tokenizer_folder(folder)
    return LanguageModel(transformer, None if source is None else load_tokenizer(source), name=str(model), quantize=quantize)
