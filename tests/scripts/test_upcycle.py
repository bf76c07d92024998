"""Upcycling: the mixture loads strictly, says what the dense model says, and keeps what belongs to it; noise changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from upcycle import Upcycling, upcycle

import unmask
from helpers import make_tokenizer, refused
from tiny import causal_logits, tiny_config, tiny_model
from unmask.data.tokenizer import load_tokenizer
from unmask.errors import ConfigError
from unmask.models.arch.moe import MoE, route
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.loading import load_model
from upcycled import upcycled

DIFFUSION = {"mask_id": 4, "block_size": 8}
SATURATED = 1e5


def dense_folder(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny dense model with a tokenizer."""
    mask = "<file_sep>" if "mask_id" in changes else None
    tokenizer = make_tokenizer(folder, mask_token=mask)
    save_model(tiny_model(family, vocab_size=tokenizer.vocab_size, eos_ids=(0, 2), std=0.2, **changes), folder)
    return folder


def pair(folder: Path, upcycling: Upcycling, dtype: torch.dtype = torch.float64) -> tuple[Transformer, Transformer]:
    """The dense model in `folder` and the mixture it becomes."""
    upcycle(folder, folder / "mixture", upcycling)
    return load_model(folder, dtype=dtype).eval(), load_model(folder / "mixture", dtype=dtype).eval()


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("llama", {}, {"family": "bailing_moe_v2"}),
        ("llama", {"tied_head": True}, {"family": "bailing_moe_v2", "shared": True, "num_active": 4, "num_groups": 2}),
        ("qwen2", DIFFUSION, {"family": "llada2_moe", "num_dense_layers": 0, "routed_scale": 2.5}),
        ("qwen3", DIFFUSION, {"family": "llada2_moe", "shared": True, "num_experts": 16, "num_groups": 8, "num_active": 3}),
        ("qwen3", DIFFUSION | {"start_id": 0}, {"family": "bailing_moe_v2", "router_std": SATURATED}),
    ],
)
def test_the_mixture_says_what_the_dense_model_says(
    family: str, changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    dense, mixture = pair(dense_folder(tmp_path, family, **changes), Upcycling(**options))
    assert mixture.config.family == options["family"]
    assert sum(isinstance(block.mlp, MoE) for block in mixture.blocks) == 2 - options.get("num_dense_layers", 1)
    expected = causal_logits(dense)
    torch.testing.assert_close(causal_logits(mixture), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_equal_scores_weigh_exactly(tmp_path: Path) -> None:
    """Saturated scores differ by their selection bias alone, and tokens still go to different experts."""
    _, mixture = pair(dense_folder(tmp_path), Upcycling(family="bailing_moe_v2", router_std=SATURATED), torch.float32)
    mlp = mixture.blocks[1].mlp
    assert isinstance(mlp, MoE)
    x_ND = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    weights_NA, indices_NA = route(mlp.router_logits(x_ND), mlp.expert_bias, mlp.moe)
    assert (weights_NA == 1.0).all(1).double().mean() > 0.9
    assert len(indices_NA.unique(dim=0)) > 10


@pytest.mark.parametrize("diffusion", [False, True])
def test_the_text_is_the_same_and_all_that_belongs_to_it(diffusion: bool, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path, **(DIFFUSION if diffusion else {}))
    upcycling = Upcycling(family="llada2_moe" if diffusion else "bailing_moe_v2", shared=True)
    config = upcycle(folder, folder / "mixture", upcycling)
    assert read_model_config(folder / "mixture") == config
    dense, mixture = (unmask.load(path, quantize="none", dtype="float32") for path in (folder, folder / "mixture"))
    assert (mixture.config.mask_id, mixture.config.block_size, mixture.eos_ids) == (
        dense.config.mask_id,
        dense.config.block_size,
        dense.eos_ids,
    )
    question = [{"role": "user", "content": "Hello, how are you?"}]
    first, second = (load_tokenizer(path).chat(question, add_generation_prompt=True) for path in (folder, folder / "mixture"))
    assert first == second
    texts = [model.generate("Hello, how are you?", max_new_tokens=24).text for model in (dense, mixture)]
    assert texts[0] == texts[1] != ""


def test_noise_and_seed_make_another_mixture() -> None:
    dense = tiny_model("llama", std=0.2)
    made = [upcycled(dense, noise=noise, seed=seed) for noise, seed in [(0.0, 0), (0.0, 1), (0.05, 0), (0.05, 0), (0.05, 1)]]
    same, reseeded, noisy, again, other = (causal_logits(model) for model in made)
    first, second, third, *_ = (model.blocks[1].mlp for model in made)
    assert not torch.equal(first.router, second.router)
    assert torch.equal(first.down[0], first.down[1])
    assert not torch.equal(third.down[0], third.down[1])
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)
    errors = [(logits - causal_logits(dense)).abs().max() for logits in (same, reseeded, noisy)]
    assert 100 * max(errors[:2]) < errors[2]


@pytest.mark.parametrize(
    ("config", "options", "names"),
    [
        (tiny_config("llada2"), {}, "mixture already"),
        (tiny_config("llama", mlp_bias=True), {}, "biases"),
        (tiny_config("llama"), {"family": "llada2_moe"}, "autoregressive"),
        (tiny_config("llama"), {"family": "llama"}, "family"),
        (tiny_config("llama"), {"num_active": 1}, "num_active"),
        (tiny_config("llama"), {"num_active": 9}, "eligible"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(config: Any, options: dict[str, Any], names: str) -> None:
    with refused(ConfigError, names):
        Upcycling(**{"family": "bailing_moe_v2", **options}).config(config)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "dense")
    with refused(ConfigError, "not empty"):
        upcycle(folder, folder, Upcycling(family="bailing_moe_v2"))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "family"), [("smollm2-135m", "bailing_moe_v2"), ("smollm2-135m-converted", "llada2_moe")])
def test_the_embedded_models_say_the_same_as_mixtures(model: str, family: str, tmp_path: Path) -> None:
    upcycle(model, tmp_path / "mixture", Upcycling(family=family, num_experts=4, num_groups=2, shared=True))
    prompts = ["What is the capital of France?", "Write one sentence about the sea."]
    dense, mixture = (unmask.load(each, quantize="none", dtype="float32") for each in (model, tmp_path / "mixture"))
    for prompt in prompts:
        assert dense.generate(prompt, max_new_tokens=32).text == mixture.generate(prompt, max_new_tokens=32).text != ""
