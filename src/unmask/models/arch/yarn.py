"""YaRN: a longer context for a model trained with a shorter one.

Owns the replacement of the rotary scaling; the weights are shared with the original model.
"""

from __future__ import annotations

from dataclasses import replace

from unmask.errors import ConfigError
from unmask.models.arch.layers import rope_frequencies
from unmask.models.arch.transformer import Transformer, reconfigured


def stretch_context(model: Transformer, factor: float) -> Transformer:
    """The same weights with YaRN scaling, for `factor` times the positions.

    Args:
        model: with unscaled rotary embeddings.
        factor: more than 1; 2 doubles the context.

    Raises:
        ConfigError: a factor of 1 or less, or a model whose embeddings are scaled already.

    Source: YaRN (2309.00071); the LLaDA2.0 report runs its long-context tests this way, with a factor of 2.
    """
    config = model.config
    if not 1.0 < factor < float("inf"):
        raise ConfigError(f"YaRN factor is {factor:g}; it must be more than 1")
    if config.rope.kind != "default":
        raise ConfigError(f"rope.kind is {config.rope.kind!r}; YaRN applies to unscaled rotary embeddings ('default') only")
    rope = replace(config.rope, kind="yarn", factor=factor, original_max_positions=config.max_positions)
    longer = replace(config, rope=rope, max_positions=int(config.max_positions * factor))
    stretched = reconfigured(model, longer)
    stretched.inv_freq = rope_frequencies(rope, longer.rotary_dim)[0].to(model.inv_freq.device)
    return stretched.eval()
