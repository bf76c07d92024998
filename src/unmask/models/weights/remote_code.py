"""Remote code of an exported folder: the files that transformers runs, and the keys of config.json that point to them.

Owns which models the code runs. The code itself is `models.remote_code`, which is copied.
"""

from __future__ import annotations

import importlib.resources
from typing import Any

from unmask.errors import CheckpointError
from unmask.models.arch.config import ModelConfig
from unmask.models.families.base import REMOTE_CODE
from unmask.models.families.registry import family_of

_PACKAGE = "unmask.models.remote_code"
_FILES = ("configuration_unmask.py", "modeling_unmask.py")
_MODEL_TYPE = 'model_type = "unmask"'


def remote_code_files(config: ModelConfig) -> dict[str, str]:
    """The files of a folder, by name; the config class has the `model_type` of the model's family, as config.json does."""
    package = importlib.resources.files(_PACKAGE)
    family = f'model_type = "{family_of(config).name}"'
    return {name: (package / name).read_text().replace(_MODEL_TYPE, family) for name in _FILES}


def remote_code_keys(config: ModelConfig, *, block_length: int) -> dict[str, Any]:
    """Keys that are added to config.json.

    Args:
        config: of a diffusion model.
        block_length: tokens in a block where the model does not say.

    Raises:
        CheckpointError: an autoregressive model, or block routing.
    """
    if config.mask_id is None:
        raise CheckpointError("remote code is of block-diffusion models; transformers runs an autoregressive one without")
    if config.moe is not None and config.moe.expert_capacity is not None:
        raise CheckpointError(
            f"expert_capacity is {config.moe.expert_capacity}; the remote code has no block routing: use unmask"
        )
    return {
        "auto_map": {
            "AutoConfig": "configuration_unmask.UnmaskConfig",
            "AutoModelForCausalLM": "modeling_unmask.UnmaskForCausalLM",
        },
        REMOTE_CODE: {**family_of(config).remote_code_keys(config), "block_length": config.block_size or block_length},
    }
