"""What a model can do: the one place that `/v1/models`, the page, `unmask info` and errors ask.

Owns which ways of decoding a config allows, and which decoding options go with them. Knows no weights.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from unmask.engine.sampling_params import Option, ResolvedParams
from unmask.errors import RequestError, UnmaskWarning
from unmask.models.arch.config import ModelConfig

_EDITING_OPTIONS = frozenset(("preset", "edit_threshold", "max_post_steps", "window"))


@dataclass(frozen=True)
class Capabilities:
    """Ways of decoding that a model was trained for.

    Attributes:
        diffusion: it denoises blocks; else it predicts the next token.
        speculative: it drafts and verifies, its text being that of decoding token by token. So it does unless told otherwise.
        infill: it fills holes, with both sides in view.
        editing: it replaces tokens that it has decided.
    """

    diffusion: bool
    speculative: bool
    infill: bool
    editing: bool

    def takes(self, option: Option) -> bool:
        """Whether a decoding option is of use with the model."""
        if option.name in _EDITING_OPTIONS:
            return self.editing
        causal = self.speculative or not self.diffusion
        return {"Diffusion": self.diffusion, "Speculative": causal}.get(option.panel, True)


def capabilities(config: ModelConfig) -> Capabilities:
    """What a model of this config can do."""
    diffusion = config.mask_id is not None
    both_sides = diffusion and not config.shifted  # the context of a shifted model is causal: it reads nothing after a hole
    return Capabilities(diffusion, config.shifted, both_sides, both_sides and config.token_editing)


def check_capable(config: ModelConfig, params: ResolvedParams, *, has_holes: bool) -> None:
    """Refuse what a shifted model would make nonsense of; warn of edits that a diffusion model was not trained for.

    Raises:
        RequestError: a shifted model, and holes or edits.
    """
    if has_holes and config.shifted:
        raise RequestError(
            "holes are not for a shifted model, which reads from left to right; use a diffusion model that is not shifted, "
            "such as smollm2-135m-converted"
        )
    if params.editing and config.shifted:
        raise RequestError(
            "edit_threshold and preset are not for a shifted model, which verifies drafts instead; leave them out, or use a "
            "model trained to edit, such as LLaDA2.1"
        )
    if params.editing and config.mask_id is not None and not config.token_editing:
        warnings.warn(
            "the model was not trained to edit: its text may get worse by edit_threshold and preset (token_editing in its "
            "config.json says otherwise)",
            UnmaskWarning,
            stacklevel=3,
        )
