"""`Request`, `DecodingStep` and `Completion`: what every decoder takes, reports and returns.

Owns these records and the checks of a request against a model's config. Knows no weights and no text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from unmask.diffusion.blocks import num_blocks
from unmask.diffusion.decode import Decision, Guess, is_greedy
from unmask.engine.policies import POLICIES
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import RequestError
from unmask.models.arch.config import ModelConfig
from unmask.models.weights.lora_adapter import LoraAdapter

if TYPE_CHECKING:
    from unmask.engine.grammar import Grammar

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A request: token ids to complete, and the options to decode by.

    Attributes:
        ids: the prompt; None is a hole to fill (diffusion models). A mask or end-of-sequence token inside it is an ordinary
            token.
        params: decoding options.
        eos_ids: tokens that end the completion. Holes are never filled with one.
        control_stops: stop strings that are the spelling of a control token, by its id: they are in no text, and end the
            completion as tokens.
        grammar: compiled; the completion is a sentence of it.
        sample: number of the completion among several of one prompt and seed; part of the key of all random numbers.
        priority: a request of priority p starts as if it had come 64 p steps later (earlier when negative).
        trace: keep every step.
        adapter: LoRA that its tokens are computed with, whatever those beside them have; None: the model as it is.
    """

    ids: tuple[int | None, ...]
    params: ResolvedParams = field(default_factory=ResolvedParams)
    eos_ids: frozenset[int] = frozenset()
    control_stops: Mapping[int, str] = field(default_factory=dict)
    grammar: Grammar | None = None
    sample: int = 0
    priority: int = 0
    trace: bool = False
    adapter: LoraAdapter | None = None

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The ids before the first one that the model decides."""
        return tuple(token for token in itertools.takewhile(lambda token: token is not None, self.ids) if token is not None)

    @cached_property
    def num_wanted(self) -> int:
        """Tokens that the model decides at most: holes and new ones."""
        return sum(token is None for token in self.ids) + self.params.max_new_tokens

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end the completion: stop tokens, and `eos_ids` unless they are ignored. A grammar's end always counts."""
        ignored = self.params.ignore_eos and self.grammar is None
        return frozenset((*self.params.stop_token_ids, *self.control_stops)) | (frozenset() if ignored else self.eos_ids)

    def banned_ends(self, position: int) -> frozenset[int]:
        """Tokens that end a text and may not stand at this position: in a hole, or before `min_new_tokens`."""
        if position < len(self.ids):
            return self.eos_ids | self.end_ids
        return self.end_ids if position < len(self.ids) + self.params.min_new_tokens else frozenset()

    @property
    def canvas_length(self) -> int:
        """Positions in whole blocks."""
        size = self.params.block_size
        return num_blocks(len(self.ids) + self.params.max_new_tokens, size) * size

    @cached_property
    def noise_seed(self) -> int:
        """Key of the random numbers beside `sample`: a hash of seed and prompt, so that prompts that are continued alike by the
        same seed draw independently."""
        key = " ".join(map(str, (self.params.seed, *self.ids)))
        return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), signed=True)

    @cached_property
    def needs_logits(self) -> bool:
        """Whether it needs more than the most probable token and its probability."""
        params = self.params
        bans_ends = bool(self.eos_ids | self.end_ids) and (params.min_new_tokens > 0 or None in self.ids)
        processed = bool(params.logit_bias) or params.has_penalties or self.grammar is not None or bans_ends
        return processed or params.logprobs is not None or not is_greedy(params) or POLICIES[params.policy].needs_entropy

    def check(self, config: ModelConfig) -> None:
        """Raises: RequestError: nothing to decide, a token outside the vocabulary, or more than the context holds."""
        params, holes = self.params, None in self.ids
        scored = params.prompt_logprobs is not None
        if params.max_new_tokens < (least := 0 if holes or scored else 1):
            raise RequestError(f"max_new_tokens is {params.max_new_tokens}; it must be at least {least}")
        if scored and (holes or not self.ids):
            raise RequestError("prompt_logprobs takes a prompt of at least one token and without holes; leave it out")
        check_vocabulary([token for token in self.ids if token is not None], config)
        check_vocabulary(list(params.logit_bias), config, "logit_bias")
        check_vocabulary(params.stop_token_ids, config, "stop_token_ids")
        check_vocabulary(list(self.eos_ids), config, "eos_id")
        if len(self.ids) + params.max_new_tokens > config.max_positions:
            raise RequestError(
                f"prompt of {len(self.ids)} tokens plus {params.max_new_tokens} new ones exceeds the context of "
                f"{config.max_positions}; shorten the prompt or lower max_new_tokens"
            )
        if self.grammar is not None and (holes or params.editing):
            raise RequestError("grammar goes with neither holes nor an edit_threshold; leave one of them out")
        if self.grammar is not None and not POLICIES[params.policy].verifiable:
            raise RequestError(f"policy is {params.policy!r}; a grammar goes with the policy threshold alone")
        if params.mode != "diffusion" and holes:
            raise RequestError(f"mode {params.mode} does not go with holes; leave one of them out")
        if params.mode != "diffusion" and config.mask_id is not None and not config.shifted:
            raise RequestError(f"mode {params.mode} takes a shifted model (converted with shift: true); leave it out")


def distinct_samples(requests: Iterable[Request]) -> list[Request]:
    """The same requests, in order, those of one prompt, seed and adapter numbered on by `sample`: no two draw the same.

    The first of them draws what it draws alone, whatever else is asked for.
    """
    seen: Counter[tuple[tuple[int | None, ...], int, LoraAdapter | None]] = Counter()
    numbered = []
    for request in requests:
        key = request.ids, request.params.seed, request.adapter
        numbered.append(replace(request, sample=request.sample + seen[key]))
        seen[key] += 1
    return numbered


def check_vocabulary(ids: Sequence[Any], config: ModelConfig, where: str = "prompt") -> None:
    """Raises: RequestError: a token outside the vocabulary."""
    outside = [token for token in ids if not isinstance(token, Integral) or not 0 <= int(token) < config.vocab_size]
    if outside:
        raise RequestError(f"{where} token {outside[0]!r} is outside the vocabulary (0..{config.vocab_size - 1})")


@dataclass(frozen=True)
class DecodingStep:
    """One forward, as seen from outside: the tokens of the block (or window of blocks) after it, by index.

    Attributes:
        start: absolute position of the first.
        fixed: True where the request gave the token.
        tokens: None where undecided.
        guess: the model's candidate where the forward computed one.
        confidence: of the candidate; 0 where there is none.
        accepted: True where this step decided the token.
        edited: True where this step replaced a decided token.
        forwards: forwards of this request so far, this one included.
    """

    start: int
    fixed: tuple[bool, ...]
    tokens: tuple[int | None, ...]
    guess: tuple[int | None, ...]
    confidence: tuple[float, ...]
    accepted: tuple[bool, ...]
    edited: tuple[bool, ...]
    forwards: int

    @classmethod
    def after(
        cls,
        positions: range,
        guess: Guess,
        decision: Decision,
        canvas: Sequence[int],
        undecided: Sequence[bool],
        fixed: Sequence[bool],
        forwards: int,
    ) -> DecodingStep:
        """The record of `positions` when `decision` has been carried out on the canvas."""
        candidates = dict(zip(guess.positions, zip(guess.tokens, guess.confidences, strict=True), strict=True))
        return cls(
            positions.start,
            tuple(fixed[p] for p in positions),
            tuple(None if undecided[p] else canvas[p] for p in positions),
            tuple(candidates[p][0] if p in candidates else None for p in positions),
            tuple(candidates[p][1] if p in candidates else 0.0 for p in positions),
            tuple(p in decision.commits for p in positions),
            tuple(p in decision.edits for p in positions),
            forwards,
        )


OnStep = Callable[[DecodingStep], None]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probabilities under the model's own distribution (without the mask token), at the step that decided."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Costs:
    """What a request cost.

    `prefill_forwards` are those that decided nothing; `cached_tokens` prompt tokens whose keys and values were there
    already; `accepted_drafts` tokens that were drafted and verified; times are in seconds: waiting, until the first denoising
    step, and from there to the end.
    """

    prefill_forwards: int = 0
    edits: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    accepted_drafts: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    denoise_seconds: float = 0.0

    @property
    def busy_seconds(self) -> float:
        """Seconds from its first forward to its end, without waiting."""
        return self.prefill_seconds + self.denoise_seconds


def decoding_seconds(costs: Sequence[Costs]) -> float:
    """Seconds from the first forward of requests that were made together to the end of the last of them."""
    if not costs:
        return 0.0
    return max(each.queue_seconds + each.busy_seconds for each in costs) - min(each.queue_seconds for each in costs)


@dataclass(frozen=True)
class Completion:
    """Decided ids in order of position, up to and including the token that ended them, and what they cost.

    `forwards` counts every forward that this request took part in, prefill and commit included. `text` is what the ids add to
    the prompt's text, up to the stop string if there is one; None without a tokenizer. `stop` is the stop string that ended it,
    if one did. `end_token` is the end-of-sequence or stop token that ended it, the last of the ids and no part of the text.
    """

    ids: tuple[int, ...]
    finish_reason: FinishReason
    forwards: int
    text: str | None = None
    stop: str | None = None
    end_token: int | None = field(default=None, compare=False)
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, compare=False)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = field(default=None, compare=False)
    costs: Costs = field(default_factory=Costs, compare=False)
    trace: tuple[DecodingStep, ...] = field(default=(), compare=False)

    @property
    def text_ids(self) -> tuple[int, ...]:
        """The ids without the one that ended them."""
        return self.ids if self.end_token is None else self.ids[:-1]


def finish(generated: Sequence[int], request: Request, forwards: int) -> Completion:
    """Cut decided tokens at the first of the request's `end_ids` or at the budget."""
    ids = tuple(generated[: request.num_wanted])
    for index, token in enumerate(ids):
        if token in request.end_ids:
            stop = request.control_stops.get(token)
            return Completion(ids[: index + 1], "stop", forwards, stop=stop, end_token=token)
    return Completion(ids, "length", forwards)


def is_compiled(grammar: object) -> bool:
    """Whether an option `grammar` is a compiled one, not its source."""
    if grammar is None or isinstance(grammar, str):
        return False
    from unmask.engine.grammar import Grammar

    return isinstance(grammar, Grammar)
