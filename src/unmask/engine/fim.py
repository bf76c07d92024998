"""Fill-in-the-middle prompts of models that predict from left to right: what stands after the gap comes before it.

Owns the control tokens of the model families that were trained so. Diffusion models need none: see `infill`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from unmask.data.tokenizer import Tokenizer

_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)
_ENDS = (
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|file_separator|>",
    "<|endoftext|>",
    "<fim_pad>",
    "<file_sep>",
    "▁<EOT>",
)


@dataclass(frozen=True)
class FimTokens:
    """Control tokens that mark the text before the gap, the text after it, and the gap.

    Attributes:
        ends: tokens that end a filling, besides the model's own.
    """

    before: int
    after: int
    gap: int
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """The tokens of a tokenizer; None if it has none."""
        ids = {spelling: id_ for id_, spelling in tokenizer.added_tokens.items()}
        for names in _TOKENS:
            if all(name in ids for name in names):
                ends = frozenset(ids[name] for name in (*names, *_ENDS) if name in ids)
                before, after, gap = (ids[name] for name in names)
                return cls(before, after, gap, ends)
        return None

    def prompt(self, prefix_ids: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
        """Ids whose continuation fills the gap. Source: Bavarian et al. (2207.14255), prefix-suffix-middle order."""
        return [*prefix_ids, self.before, *before, self.after, *after, self.gap]
