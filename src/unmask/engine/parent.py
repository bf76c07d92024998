"""The parent of a self-speculative model: the same weights, decoded autoregressively and without drafts of masks.

Owns how it is made of a loaded model, for comparisons. The weights are shared, not copied.
"""

from __future__ import annotations

from typing import NamedTuple

from unmask.data.tokenizer import Tokenizer
from unmask.engine.backends.native import NativeBackend, packed_backend
from unmask.engine.llm import LanguageModel
from unmask.models.arch.gated_lora import parent_config
from unmask.models.arch.transformer import reconfigured


class Parent(NamedTuple):
    """A parent and the ids that it reads before a prompt, where a self-speculative model adds them itself."""

    model: LanguageModel
    start: tuple[int, ...]


def parent_of(model: LanguageModel, tokenizer: Tokenizer | None = None) -> Parent:
    """The parent of a model with gated LoRA, which decodes with weights of the same kind.

    Args:
        model: self-speculative.
        tokenizer: of the parent, where it takes and gives text; not the model's own, which may add a start token.

    Raises:
        ConfigError: a model without gated LoRA.
    """
    transformer = reconfigured(model.transformer, parent_config(model.config))
    is_packed = isinstance(model.backend(), NativeBackend)
    weights = packed_backend(transformer, model.quantize) if is_packed else transformer
    parent = LanguageModel(weights, tokenizer, name=f"parent of {model.name}", reload=lambda: transformer)
    return Parent(parent, () if model.config.start_id is None else (model.config.start_id,))
