"""A generation: completed text, what it cost, and how it is printed.

Owns the type that the calls of `LanguageModel` return.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from unmask.engine.request import Completion, Costs, DecodingStep, FinishReason, TokenLogprob


@dataclass(frozen=True)
class Generation:
    """Completed text and what it cost.

    `tokens_per_forward` counts every forward, prefill and commit included. `seconds` are those of decoding, from the first
    forward to the last; `setup_seconds` those before: encoding the prompt, and in a first call quantising the weights or
    compiling a grammar.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    forwards: int
    tokens_per_forward: float
    seconds: float
    tokens_per_second: float
    setup_seconds: float
    costs: Costs
    logprobs: tuple[TokenLogprob, ...] | None = None
    trace: tuple[DecodingStep, ...] = ()

    @classmethod
    def from_completion(
        cls, completion: Completion, prompt_tokens: int, *, seconds: float | None = None, setup_seconds: float = 0.0
    ) -> Generation:
        """Text and costs of a completion; `seconds`: where they are others than the engine's."""
        assert completion.text is not None, "an engine with a tokenizer gives texts"
        count, seconds = len(completion.ids), completion.costs.busy_seconds if seconds is None else seconds
        return cls(
            text=completion.text,
            ids=completion.ids,
            prompt_tokens=prompt_tokens,
            completion_tokens=count,
            finish_reason=completion.finish_reason,
            forwards=completion.forwards,
            tokens_per_forward=count / max(completion.forwards, 1),
            seconds=seconds,
            tokens_per_second=count / max(seconds, 1e-6),
            setup_seconds=setup_seconds,
            costs=completion.costs,
            logprobs=completion.logprobs,
            trace=completion.trace,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields that `unmask generate --json` prints."""
        values = asdict(replace(self, trace=()))
        for name in ("ids", "trace", *(["logprobs"] if self.logprobs is None else [])):
            del values[name]
        return values
