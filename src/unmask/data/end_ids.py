"""End ids: the tokens that end an answer, decided in this one place for engine, server, command line, evaluation and training.

Owns how a model's config and its tokenizer are put together. What generation_config.json adds to a config is `checkpoint`'s
matter, which token closes an assistant turn in the chat template `tokenizer`'s.
"""

from __future__ import annotations

from unmask.data.tokenizer import Tokenizer
from unmask.models.arch.config import ModelConfig


def end_ids(config: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Every id that ends an answer of a model.

    Each source adds to the others, so that a model stops at whatever any of them names: the config (config.json and
    generation_config.json), the tokenizer's end of text, and the token with which its chat template closes an assistant turn.
    The last counts for plain text too; without a template no chat token does.

    Args:
        config: of the model.
        tokenizer: None: the config alone decides.

    Returns:
        The ids, the config's first, none outside the vocabulary.
    """
    own = [] if tokenizer is None else [tokenizer.eos_id, *sorted(tokenizer.eos_ids)]
    return tuple(dict.fromkeys(id_ for id_ in (*config.eos_ids, *own) if id_ < config.vocab_size))
