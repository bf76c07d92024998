"""The parent of a self-speculative model: the same weights, decoded autoregressively and without drafts of masks.

Owns how it is made of a loaded model, for comparisons. The weights are shared, not copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from unmask.data.tokenizer import Tokenizer
from unmask.engine.backends.native import NativeBackend
from unmask.engine.llm import LanguageModel
from unmask.models.arch.gated_lora import parent_config
from unmask.models.arch.transformer import Transformer, reconfigured
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

    def transformer() -> Transformer:
        return reconfigured(model.transformer, parent_config(model.config))

    weights: NativeBackend | Transformer
    if isinstance(backend, NativeBackend):
        weights = NativeBackend(_without_gated_lora(backend.weights), load_kernels())
    else:
        weights = transformer()
    name = f"parent of {model.name}"
    return Parent(LanguageModel(weights, tokenizer, name=name, reload=transformer, digest=model.digest), start)


def _without_gated_lora(weights: PackedWeights) -> PackedWeights:
    """The parent's packed weights; its mask token, which it never writes, keeps the vector of the child's."""
    matrices = {name: matrix for name, matrix in weights.matrices.items() if not name.endswith((".input", ".output"))}
    return replace(weights, config=parent_config(weights.config), matrices=matrices)
