"""The parent of a self-speculative model: the same weights, decoded autoregressively and without drafts of masks.

Owns how it is made of a loaded model, for comparisons. The weights are shared, not copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from unmask.data.tokenizer import Tokenizer
from unmask.engine.backends.native import NativeBackend, packed_backend
from unmask.engine.llm import LanguageModel
from unmask.models.arch.gated_lora import parent_config
from unmask.models.arch.transformer import reconfigured
from unmask.models.native.library import load_kernels
from unmask.models.native.packing import PackedWeights


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
    start = () if model.config.start_id is None else (model.config.start_id,)
    backend = model.backend()
    if model.digest is not None and isinstance(backend, NativeBackend):
        packed = NativeBackend(_without_gated_lora(backend.weights), load_kernels())
        return Parent(LanguageModel(packed, tokenizer, name=f"parent of {model.name}", digest=model.digest), start)
    transformer = reconfigured(model.transformer, parent_config(model.config))
    is_packed = isinstance(backend, NativeBackend)
    weights = packed_backend(transformer, model.quantize) if is_packed else transformer
    parent = LanguageModel(weights, tokenizer, name=f"parent of {model.name}", reload=lambda: transformer)
    return Parent(parent, start)


def _without_gated_lora(weights: PackedWeights) -> PackedWeights:
    """The parent's packed weights; its mask token, which it never writes, keeps the vector of the child's."""
    matrices = {name: matrix for name, matrix in weights.matrices.items() if not name.endswith((".input", ".output"))}
    return replace(weights, config=parent_config(weights.config), matrices=matrices)
