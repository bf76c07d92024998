"""The Ling 2.0 architecture (bailing_moe_v2, llada2_moe) against a slow implementation that shares no code with ours.

The reference reads tensors under their names on disk and loops over tokens, heads and experts in float64 numpy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from ling_reference import Reference, frequencies
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.layers import rope_frequencies
from unmask.models.arch.moe import MoE
from unmask.models.arch.transformer import Transformer
from unmask.models.families.registry import read_config
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.loading import load_model

YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
CONFIG: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 600_000,
    "partial_rotary_factor": 0.5, "num_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "moe_intermediate_size": 12, "num_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "use_qk_norm": True, "mask_token_id": 50, "block_size": 4,
}  # fmt: skip
LENGTH = 12


def config_of(family: str, *, yarn: bool = False, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **CONFIG, "rope_scaling": YARN if yarn else None, **changes}


def random_model(hf: dict[str, Any]) -> Transformer:
    """Float64 weights; norms and the selection bias are random too."""
    generator = torch.Generator().manual_seed(7)
    model = Transformer(read_config(hf)).double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(std=0.3, generator=generator).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def visible_mask(kind: str) -> NDArray[np.bool_]:
    """Causal over tokens, or over blocks of four: bidirectional inside one, causal across."""
    index = np.arange(LENGTH) if kind == "causal" else np.arange(LENGTH) // CONFIG["block_size"]
    return index[:, None] >= index[None, :]


def our_logits(model: Transformer, tokens: list[int], visible: NDArray[np.bool_]) -> torch.Tensor:
    with torch.no_grad():
        attend = DenseAttend(torch.from_numpy(visible)[None])
        return model.head(model(torch.tensor([tokens]), torch.arange(LENGTH)[None], attend))[0]


TOKENS = [3, 17, 50, 50, 8, 50, 2, 44, 50, 50, 50, 9]


@pytest.mark.parametrize("mask", ["causal", "blocks"])
@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
@pytest.mark.parametrize("family", ["bailing_moe_v2", "llada2_moe"])
def test_equals_the_slow_reference(family: str, yarn: bool, mask: str, tmp_path: Path) -> None:
    hf = config_of(family, yarn=yarn)
    model = random_model(hf)
    save_model(model, tmp_path / "model")
    reference = Reference(hf, load_file(tmp_path / "model" / "model.safetensors"), visible_mask(mask))
    expected = reference.logits(TOKENS)

    model.inv_freq = torch.tensor(reference.frequencies, dtype=torch.float64)
    exact = our_logits(model, TOKENS, visible_mask(mask)).numpy()
    np.testing.assert_allclose(exact, expected, atol=1e-9, rtol=0)

    narrow = load_model(tmp_path / "model", dtype=torch.float32)
    np.testing.assert_allclose(our_logits(narrow, TOKENS, visible_mask(mask)).numpy(), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.3


@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
def test_frequencies_are_the_formula(yarn: bool) -> None:
    hf = config_of("llada2_moe", yarn=yarn, head_dim=64)
    rope = read_config(hf).rope
    expected, scale = frequencies(hf)
    found, found_scale = rope_frequencies(rope, 32)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found_scale == pytest.approx(scale, rel=1e-12)


def test_groups_and_bias_decide_in_this_setting(tmp_path: Path) -> None:
    """Guards the golden test itself: ignoring the group limit or the bias would choose other experts there."""
    hf = config_of("bailing_moe_v2")
    save_model(random_model(hf), tmp_path / "model")
    disk = load_file(tmp_path / "model" / "model.safetensors")

    def chosen(hf: dict[str, Any], disk: dict[str, torch.Tensor]) -> list[set[int]]:
        reference = Reference(hf, disk, visible_mask("causal"))
        reference.logits(TOKENS)
        return reference.chosen[:LENGTH]

    ungrouped = chosen({**hf, "n_group": 1, "topk_group": 1}, disk)
    unbiased = chosen(hf, {k: v * (0 if k.endswith("expert_bias") else 1) for k, v in disk.items()})
    assert chosen(hf, disk) != ungrouped
    assert chosen(hf, disk) != unbiased


def test_bfloat16_keeps_router_and_bias_in_float32(tmp_path: Path) -> None:
    hf = config_of("llada2_moe")
    save_model(random_model(hf).float(), tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.bfloat16)
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]
    assert [layer.router.dtype for layer in layers] == [torch.float32] * 2
    assert [layer.expert_bias.dtype for layer in layers] == [torch.float32] * 2
    assert model.inv_freq.dtype == torch.float32
    others = {p.dtype for name, p in model.named_parameters() if not name.endswith("router")}
    assert others == {torch.bfloat16}
    assert our_logits(model, TOKENS, visible_mask("blocks")).dtype == torch.bfloat16
    save_model(model, tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    original = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    assert torch.equal(stored[name], original[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_sizes_the_grouped_kernel_refuses_still_run(dtype: torch.dtype) -> None:
    """Rows of 5 numbers are no multiple of 16 bytes."""
    wide = random_model(config_of("llada2_moe", moe_intermediate_size=5))
    narrow = random_model(config_of("llada2_moe", moe_intermediate_size=5)).to(dtype)
    exact, found = (our_logits(model, TOKENS, visible_mask("blocks")) for model in (wide, narrow))
    assert (found.double() - exact).abs().mean() < (1e-5 if dtype == torch.float32 else 0.3) * exact.std()
