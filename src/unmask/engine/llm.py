"""`LanguageModel`: a transformer with its tokenizer, and the calls a user makes.

Owns the public Python interface: text in, text out. Decoding itself is `engine.engine`'s.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unmask.data.chat import Message
from unmask.data.end_ids import end_ids
from unmask.data.tokenizer import Tokenizer
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.backends.base import Backend
from unmask.engine.backends.native import NativeBackend, packed_backend
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.capabilities import Capabilities, capabilities, check_capable
from unmask.engine.draft_statistics import DraftStatistics, open_statistics
from unmask.engine.engine import Engine
from unmask.engine.generation import Generation
from unmask.engine.infill import Infilling, best_filling, filling_requests, split_holes
from unmask.engine.prompts import Prompt, encode_chat, encode_prompt
from unmask.engine.quantization import PACKED_BITS, decoding_weights
from unmask.engine.request import Completion, OnStep, Request, TokenLogprob, check_vocabulary, distinct_samples, is_compiled
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import RequestError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer
from unmask.models.dtypes import dtype_name
from unmask.models.weights.lora_adapter import LoraAdapter

if TYPE_CHECKING:
    from unmask.engine.grammar import Grammar, GrammarCompiler


class LanguageModel:
    """A model ready to generate; make one with `unmask.load`.

    Diffusion models (a `mask_id` in their config) decode block by block, others one token at a time. Calls keep no state and
    are deterministic. They may come from several threads at once, each with an engine of its own.

    Args:
        weights: as loaded, or packed for the CPU kernels, and then with `reload`.
        tokenizer: None: only calls that take and give ids work.
        name: what to call it in messages.
        quantize: what becomes of loaded weights, on a CPU: "int8", "int4"; "auto": int8 where kernels run; "none".
        reload: reads the weights of packed ones, when `transformer` is asked for.
        folder: of the model, for which what is learnt on drafts is kept (`DraftStatistics`); None: in memory alone.
        expert_capacity: experts that the tokens of a block share in each layer (block routing); None: as in training.
        digest: of the weights of a quantised model, by its manifest.

    Attributes:
        config: the architecture and special token ids.
        quantize: the weights that decode: "int8", "int4" or "none".
        expert_capacity: as given.
        adapter: LoRA that its requests have (`adapted_model`).
    """

    def __init__(
        self,
        weights: Transformer | NativeBackend,
        tokenizer: Tokenizer | None,
        *,
        name: str,
        quantize: str | None = "none",
        reload: Callable[[], Transformer] | None = None,
        folder: Path | None = None,
        expert_capacity: int | None = None,
        digest: str | None = None,
    ) -> None:
        self.config, self.tokenizer, self.name = weights.config, tokenizer, name
        if tokenizer is not None and self.config.start_id is not None:
            tokenizer.set_start_token(self.config.start_id)
        self._folder, self.digest = folder, digest
        self._transformer: Transformer | None = None
        self._reload, self._reloading = reload, threading.Lock()
        self._native = weights if isinstance(weights, NativeBackend) else None
        if not isinstance(weights, NativeBackend):
            self._transformer = weights.eval()
            kind = decoding_weights(quantize, weights.embed.weight.device)
            self._native = None if kind == "none" else packed_backend(weights, kind)
        self.expert_capacity = expert_capacity
        if expert_capacity is not None:
            self.config.with_expert_capacity(expert_capacity)  # checks it
            self._native = None if self._native is None else self._native.with_expert_capacity(expert_capacity)
        self.adapter: LoraAdapter | None = None
        bits = PACKED_BITS["none"] if self._native is None else self._native.bits
        self.quantize = next(name for name in PACKED_BITS if PACKED_BITS[name] == bits)

    @property
    def transformer(self) -> Transformer:
        """The weights as loaded; read when they are first asked for where packed ones decode."""
        with self._reloading:
            transformer = self._transformer
            if transformer is None:
                assert self._reload is not None, "packed weights alone come with what reads the others"
                transformer = self._transformer = self._reload().eval()
            return transformer

    @cached_property
    def num_parameters(self) -> int:
        """Parameters, each counted once; those of gated LoRA included."""
        with torch.device("meta"):
            return Transformer(self.config).num_parameters()

    @property
    def weights_dtype(self) -> str:
        """The number format of the weights as loaded; of a quantised model, "int8" or "int4"."""
        return dtype_name(self.transformer.embed.weight.dtype) if self.digest is None else self.quantize

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, unless a request names its own."""
        return end_ids(self.config, self.tokenizer)

    @property
    def is_diffusion(self) -> bool:
        """Whether the model decodes by denoising."""
        return self.config.mask_id is not None

    @property
    def capabilities(self) -> Capabilities:
        """The ways of decoding that the model was trained for."""
        return capabilities(self.config)

    def backend(self) -> Backend:
        """What computes the forward passes."""
        return self._plain if self._native is None else self._native

    @cached_property
    def _plain(self) -> TorchBackend:
        backend = TorchBackend(self.transformer)
        return backend if self.expert_capacity is None else backend.with_expert_capacity(self.expert_capacity)

    @cached_property
    def drafting(self) -> DraftStatistics:
        """What its engines have learnt on drafts: what one of them has, the next knows."""
        return open_statistics(self.name, self._folder, self.backend().kernels, self.config.vocab_size)

    def engine(self, *, mask_id: int | None = None, **options: Any) -> Engine:
        """An engine of this model for many requests at a time; options as of `Engine`."""
        decode = None if self.tokenizer is None else self.tokenizer.decode
        return Engine(self.backend(), mask_id=mask_id, decode=decode, **{"drafting": self.drafting, **options})

    def encode_prompt(self, prompt: Prompt, *, chat: bool | None = None) -> list[int]:
        """Ids of a prompt; see `prompts.encode_prompt`."""
        return encode_prompt(self._need_tokenizer(), prompt, chat=chat)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation, laid out for an answer."""
        return encode_chat(self._need_tokenizer(), messages)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        chat: bool | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Generation:
        """Answer a prompt.

        Args:
            prompt: the user's message, or plain text to continue with `chat=False`; or a conversation, as a list of messages
                such as `{"role": "user", "content": "Hello"}`.
            params: decoding options.
            chat: use the tokenizer's chat template; default: if there is one.
            on_step: sees every denoising step.
            options: keywords of `request`: decoding options by name among them, such as `temperature=0.8`.

        Returns:
            Text, counts and timing.

        Raises:
            RequestError: no tokenizer, an option out of range, or a prompt longer than the context.
        """
        started = time.perf_counter()
        ids = self.encode_prompt(prompt, chat=chat)
        completion = self.complete(ids, params, on_step=on_step, **options)
        setup = time.perf_counter() - started - completion.costs.queue_seconds - completion.costs.busy_seconds
        return Generation.from_completion(completion, len(ids), setup_seconds=setup)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        chat: bool | None = None,
        mask_id: int | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Answer many prompts at once, each as `generate` would; samples of equal prompts differ, the first is `generate`'s."""
        started = time.perf_counter()
        self._need_tokenizer()
        if isinstance(prompts, str):
            raise RequestError(f"prompts is {prompts!r:.60}; it must be a list of prompts")
        encoded = [self.encode_prompt(prompt, chat=chat) for prompt in prompts]
        requests = distinct_samples(self.request(ids, params, **options) for ids in encoded)
        engine = self.engine(mask_id=mask_id)
        setup_seconds = time.perf_counter() - started
        completions = engine.run(requests)
        pairs = zip(encoded, completions, strict=True)
        return [Generation.from_completion(each, len(ids), setup_seconds=setup_seconds) for ids, each in pairs]

    def infill(
        self,
        text: str,
        params: SamplingParams | None = None,
        *,
        hole: str = "___",
        tokens: int | tuple[int, int] = 8,
        mask_id: int | None = None,
        **options: Any,
    ) -> Infilling:
        """Fill the holes of a text, with what stands on both sides of each in view.

        Args:
            text: with one or more holes; a space before a hole is part of what is filled in.
            params: decoding options; without a `block_size`, one block spans the text, so that every hole sees all of it.
            hole: how a hole is written.
            tokens: tokens of each hole; a range (least, most) tries every length and keeps the likeliest filling.
            mask_id: as of `complete`.
            options: keywords of `request`.

        Returns:
            The filled text, what went into each hole, and what it cost.

        Raises:
            RequestError: no hole, a model without `capabilities.infill`, an option out of range, or too long a text.
        """
        tokenizer = self._need_tokenizer()
        parts = split_holes(text, hole)
        template = self.request((None,), params, **options)  # a hole: not speculative
        whole = (params or SamplingParams()).block_size is None and options.get("block_size") is None
        requests = filling_requests(template, parts, tokens, tokenizer, whole=whole)
        completions = self.engine(mask_id=mask_id, prefix_cache=False).run(requests)
        return best_filling(requests, completions, tokenizer)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles JSON schemas, regular expressions and Lark grammars for this model."""
        from unmask.engine.grammar import GrammarCompiler  # and llguidance, which few requests need

        return GrammarCompiler(self._need_tokenizer(), self.eos_ids, self.config.vocab_size)

    def generate_ids(
        self, ids: Sequence[int | None], params: SamplingParams | None = None, *, mask_id: int | None = None, **options: Any
    ) -> list[int]:
        """Complete token ids; works without a tokenizer.

        Args:
            ids: the prompt; None is a hole, filled too and given first.
            params: decoding options.
            mask_id: the mask token; default: the model's. Given for an autoregressive model, it decodes by denoising.
            options: keywords of `request`.

        Returns:
            The completion, up to and including the end-of-sequence token.

        Raises:
            RequestError: an option out of range, or a prompt longer than the context.
        """
        return list(self.complete(ids, params, mask_id=mask_id, **options).ids)

    def complete(
        self,
        ids: Sequence[int | None],
        params: SamplingParams | None = None,
        *,
        mask_id: int | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Completion:
        """`generate_ids` with the finish reason and the costs; `on_step` sees every denoising step."""
        request = self.request(ids, params, **options)
        request.check(self.config)
        engine = self.engine(mask_id=mask_id, num_tokens=request.canvas_length + request.params.block_size, prefix_cache=False)
        for update in engine.stream(request, watch=on_step is not None):
            if on_step is not None and update.step is not None:
                on_step(update.step)
            if update.completion is not None:
                return update.completion
        raise AssertionError("a stream ends with a completion")

    def request(
        self,
        ids: Sequence[int | None],
        params: SamplingParams | None = None,
        *,
        eos_id: int | Sequence[int] | None = None,
        sample: int = 0,
        priority: int = 0,
        trace: bool = False,
        **options: Any,
    ) -> Request:
        """A request for this model's engine.

        Args:
            ids: the prompt; None is a hole to fill.
            params: decoding options.
            eos_id: token or tokens that end the completion; default: the model's.
            sample: which of several completions of one prompt; each has its own random numbers.
            priority: of a request among those that wait; see `Request`.
            trace: keep every step.
            options: decoding options by name, in place of those in `params`; `grammar` may also be one that `grammars` has
                compiled, and then replaces any that `params` ask for.

        Raises:
            RequestError: an option out of range, unknown, or not for this model, or a grammar that does not compile.
        """
        grammar = options.pop("grammar") if is_compiled(options.get("grammar")) else None
        params = (params or SamplingParams()).replace(**options)
        resolved = params.resolve(self.config, has_holes=None in ids)
        check_capable(self.config, resolved, has_holes=None in ids)
        control_tokens = {} if self.tokenizer is None else self.tokenizer.special_tokens
        return Request(
            ids=tuple(ids),
            params=resolved,
            eos_ids=frozenset([eos_id] if isinstance(eos_id, (int, str)) else self.eos_ids if eos_id is None else eos_id),
            control_stops={control_tokens[text]: text for text in params.stop if text in control_tokens},
            grammar=self._grammar(params) if grammar is None else grammar,
            sample=sample,
            priority=priority,
            trace=trace,
            adapter=self.adapter,
        )

    def score(self, text: str, *, after: str = "", alternatives: int = 0) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the tokens of a text by the weights as loaded, teacher-forced; their sum is its log-likelihood.

        Args:
            text: what to score.
            after: what stands before it. Without, the first token has nothing before it and no entry.
            alternatives: likeliest tokens to list at each position, at most 20.

        Returns:
            Nats per token: exact where the context attends causally, else by the chain rule (`BlockScoringSequence`).

        Raises:
            RequestError: no tokenizer, nothing to score, or more than the context holds.
        """
        ids, given = (self.encode_prompt(each, chat=False) for each in (after + text, after))
        first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, given, strict=False)))
        request = self.request(ids, max_new_tokens=0, prompt_logprobs=alternatives)
        engine = Engine(self.transformer, num_tokens=request.canvas_length + request.params.block_size, prefix_cache=False)
        scores = engine.run([request])[0].prompt_logprobs or ()
        return tuple(score for score in scores[first:] if score is not None)

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], *, block_size: int | None = None) -> Tensor:
        """Logits of a sequence under the block-causal mask, of the weights as loaded, whatever decodes.

        Args:
            ids: tokens, masks among them or not.
            block_size: tokens see their own block and those before it; default: the model's, or 1 (causal) if it has none.

        Returns:
            float32 [len(ids), vocab]. Row i predicts token i, of an autoregressive model token i + 1. A shifted model reads
            all but the last block causally; no row sees its last id.

        Raises:
            RequestError: no ids, more than the context holds, or one outside the vocabulary.
        """
        check_vocabulary(ids, self.config)
        if not 0 < len(ids) <= self.config.max_positions:
            raise RequestError(f"{len(ids)} tokens given; logits need 1 to {self.config.max_positions}, the model's context")
        size = block_size if block_size is not None else self.config.block_size or 1
        if size < 1:
            raise RequestError(f"block_size is {size}; it must be at least 1")
        device, length = self.transformer.embed.weight.device, len(ids)
        tokens = torch.tensor(self.config.inputs(ids, 0, length), device=device)[None]
        context = (length - 1) // size * size if self.config.shifted else 0
        attend = DenseAttend(block_causal_mask(length, length, size, context=context).to(device)[None])
        positions = torch.arange(length, device=device)[None]
        hidden = self.transformer(tokens, positions, attend, noisy_BT=positions >= context)
        out: Tensor = self.transformer.head(hidden)[0].float()
        return out

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        if params.json_schema is not None:
            return self.grammars.json_schema(params.json_schema)
        if params.regex is not None:
            return self.grammars.regex(params.regex)
        return None if params.grammar is None else self.grammars.lark(params.grammar)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"model {self.name} has no tokenizer; use generate_ids, or add tokenizer.json to its folder")
        return self.tokenizer
