"""`BatchUsage`: tokens of all answers of a batch, as OpenAI's batch object has them.

Owns where the bodies of each endpoint keep their counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_INPUT = ("prompt_tokens", "input_tokens", "tokens_evaluated")
_OUTPUT = ("completion_tokens", "output_tokens", "tokens_predicted")
_DETAILS = ("prompt_tokens_details", "input_tokens_details")


@dataclass
class BatchUsage:
    """Tokens of prompts, of those the ones found in the KV cache, and tokens of completions."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def add(self, body: Mapping[str, Any]) -> None:
        """Count an answer: OpenAI's three forms and Anthropic's have `usage`, llama.cpp's infill has its counts in the body."""
        usage = body.get("usage") or body
        beside = usage.get("cache_read_input_tokens", 0)  # Anthropic's `input_tokens` are without them
        self.input_tokens += _first(usage, _INPUT, 0) + beside
        self.cached_tokens += _first(usage, _DETAILS, {}).get("cached_tokens", 0) + beside + usage.get("tokens_cached", 0)
        self.output_tokens += _first(usage, _OUTPUT, 0)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's `usage` of a batch."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


def _first(values: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """The value of the first of these names that is there."""
    return next((values[name] for name in names if name in values), default)
