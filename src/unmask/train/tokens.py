"""Special tokens of a run: the mask token, the start token of a shifted model, and the end ids, before any weights are read.

Owns what a recipe changes in a model's config and its tokenizer. `pack` and training both ask here, so that the rows of one are
the rows of the other.
"""

from __future__ import annotations

from dataclasses import replace

from unmask.data.end_ids import end_ids
from unmask.data.mask_token import choose_mask_token
from unmask.data.tokenizer import Tokenizer
from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.train.recipe import Recipe

_ANY_CHAT = [{"role": "user", "content": "x"}]


def training_config(config: ModelConfig, tokenizer: Tokenizer, recipe: Recipe) -> ModelConfig:
    """The config of the model that a recipe trains; the mask token and the start token are set in the tokenizer.

    Args:
        config: of the recipe's model.
        tokenizer: of the recipe's model; changed.
        recipe: mask token, shift, block size and objective.

    Returns:
        The config, with a larger vocabulary where the mask token needs a row.

    Raises:
        ConfigError: the model does not fit the objective, or the mask token or shift contradicts it.
    """
    config = _with_mask_token(config, tokenizer, recipe)
    if config.start_id is not None:
        tokenizer.set_start_token(config.start_id)
    # What training teaches to end with is saved with the model.
    return replace(config, eos_ids=end_ids(config, tokenizer))


def _with_mask_token(config: ModelConfig, tokenizer: Tokenizer, recipe: Recipe) -> ModelConfig:
    """With the mask token that is the diffusion model's own, the recipe's, or an unused one; unchanged if autoregressive."""
    own, objective = config.mask_id, recipe.objective
    if objective.autoregressive:
        if own is not None:
            raise ConfigError(
                f"{recipe.model} is a diffusion model; objective.kind {objective.kind} takes an autoregressive one"
            )
        return config
    if own is None and recipe.schedule is None:
        raise ConfigError(
            f"{recipe.model} is autoregressive: fine-tuning needs a diffusion model; convert it first (unmask convert), "
            "give the recipe a schedule of block sizes, or train it as it is (objective.kind next_token)"
        )
    if own is not None and recipe.mask_token is None and own in tokenizer.added_tokens:
        token = tokenizer.added_tokens[own]
    else:
        token = recipe.mask_token or choose_mask_token(tokenizer, config.vocab_size).token
    mask_id = tokenizer.set_mask_token(token)
    if own is not None and mask_id != own:
        raise ConfigError(f"mask token {token} has id {mask_id}, the model was trained with {own}; leave mask_token out")
    start_id = _start_token(config, tokenizer, recipe)
    grown = replace(config, vocab_size=max(config.vocab_size, mask_id + 1))
    return grown.with_diffusion(mask_id=mask_id, block_size=recipe.decode_block_size, start_id=start_id)


def _start_token(config: ModelConfig, tokenizer: Tokenizer, recipe: Recipe) -> int | None:
    """The token a shifted model reads before a document: what its parent's documents begin with. None: not shifted."""
    if config.shifted:
        return config.start_id
    if recipe.shift:
        if config.mask_id is not None:
            raise ConfigError(f"{recipe.model} was converted without shift; leave shift out, or convert its parent anew")
        chat = tokenizer.chat(_ANY_CHAT, add_generation_prompt=True) if tokenizer.has_chat_template else []
        candidates = (*chat[:1], *tokenizer.prefix_ids[:1], config.bos_id, *config.eos_ids)
        return next((token for token in candidates if token is not None), 0)
    return None
