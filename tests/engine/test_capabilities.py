"""What a model can do, by its config."""

from __future__ import annotations

import pytest

from tiny import MASK, tiny_config
from unmask.engine.capabilities import Capabilities, capabilities
from unmask.engine.sampling_params import SamplingParams
from unmask.models.arch.config import ModelConfig
from unmask.models.families.registry import published_config, read_config, write_config

AUTOREGRESSIVE = tiny_config("llama")
CONVERTED = AUTOREGRESSIVE.with_diffusion(mask_id=MASK, block_size=4)
SHIFTED = AUTOREGRESSIVE.with_diffusion(mask_id=MASK, block_size=4, start_id=1)
LLADA2 = read_config(published_config("llada2-mini"))


@pytest.mark.parametrize(
    ("config", "expected", "left_out"),
    [
        (AUTOREGRESSIVE, Capabilities(False, False, False, False), ("threshold", "policy", "preset", "window")),
        (CONVERTED, Capabilities(True, False, True, False), ("mode", "preset", "edit_threshold", "window")),
        (SHIFTED, Capabilities(True, True, False, False), ("preset", "edit_threshold", "max_post_steps", "window")),
        (LLADA2, Capabilities(True, False, True, True), ("mode",)),
    ],
    ids=["autoregressive", "converted", "shifted", "LLaDA2"],
)
def test_a_config_says_what_the_model_can_do(config: ModelConfig, expected: Capabilities, left_out: tuple[str, ...]) -> None:
    found = capabilities(config)
    assert found == expected
    options = SamplingParams.options()
    assert not any(found.takes(options[name]) for name in left_out)
    assert all(found.takes(options[name]) for name in ("temperature", "max_new_tokens", "stop"))
    assert capabilities(read_config(write_config(config))) == expected, "config.json keeps it"
