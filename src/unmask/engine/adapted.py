"""`adapted_model`: a language model with a LoRA adapter, beside the same model without it.

Owns what an adapter changes of a `LanguageModel`: its requests, their ends, and the tokenizer where the adapter has its own.
The weights, and what computes them, are shared.
"""

from __future__ import annotations

from copy import copy
from pathlib import Path

from unmask.data.end_ids import end_ids
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError
from unmask.models.weights.lora_adapter import read_lora_adapter


def adapted_model(model: LanguageModel, folder: Path, *, name: str, max_rank: int | None = None) -> LanguageModel:
    """A model with an adapter. Requests of it, of the model itself and of other adapters share one engine and its batches.

    Only requests have the adapter: `transformer` and `logits` are the base's.

    Args:
        model: the base, which stays as it is.
        folder: of an adapter of this model, as `unmask sft` or peft write it, without an embedding of its own.
        name: of the adapter.
        max_rank: rank that is still accepted; None: any.

    Raises:
        CheckpointError: as of `read_lora_adapter`, or a damaged tokenizer.
        ConfigError: the model has an adapter already.
    """
    if model.adapter is not None:
        raise ConfigError(f"{model.name} has the adapter {model.adapter.name} already; give its base")
    adapter = read_lora_adapter(folder, model.config, name=name, max_rank=max_rank)
    model.backend().prepare_adapter(adapter)
    _ = model.drafting  # before it is copied: what is learnt on drafts is shared
    adapted = copy(model)
    adapted.name, adapted.adapter = f"{model.name}:{name}", adapter
    tokenizer = _own_tokenizer(model, folder)
    if tokenizer is not None:
        adapted.tokenizer = tokenizer
        adapted.__dict__.pop("grammars", None)
    ends = (*adapter.eos_ids, *end_ids(model.config, adapted.tokenizer))
    adapted.eos_ids = tuple(dict.fromkeys(id_ for id_ in ends if id_ < model.config.vocab_size))
    return adapted


def _own_tokenizer(model: LanguageModel, folder: Path) -> Tokenizer | None:
    """The adapter's tokenizer, where it has one and lays out prompts otherwise than the model's."""
    if model.tokenizer is None or not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = load_tokenizer(folder)
    tokenizer.set_start_token(model.config.start_id)
    tokenizer.check_rows(model.config.vocab_size)
    return None if tokenizer.identity == model.tokenizer.identity else tokenizer
