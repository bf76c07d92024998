"""Gated LoRA: clean rows compute what the parent does, to the bit, and noisy rows alone learn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import refused
from tiny import MASK, perturb, tiny_config, tiny_model
from unmask.diffusion.masks import block_causal_mask
from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.config import RopeConfig
from unmask.models.arch.gated_lora import add_gated_lora, parent_config, train_gated_lora
from unmask.models.arch.layers import GatedLoraLinear
from unmask.models.arch.transformer import Transformer, reconfigured
from unmask.models.families.registry import read_config, write_config
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.loading import load_model

FAMILIES = ("llama", "qwen2", "qwen3")
SHIFTED = {"mask_id": MASK, "start_id": 1, "block_size": 4}
LAYERS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
LENGTH, CONTEXT = 14, 9
# Behind its context the first sequence denoises; the second is all context, and so has no mask.
TOKENS = torch.arange(2 * LENGTH).reshape(2, LENGTH)
TOKENS[0, [10, 11, 13]] = MASK
NOISY = torch.stack((torch.arange(LENGTH) >= CONTEXT, torch.zeros(LENGTH, dtype=torch.bool)))


def shifted(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    return tiny_model(family, dtype=dtype, **(SHIFTED | changes))  # type: ignore[arg-type]


def gated(family: str = "llama", rope: RopeConfig = RopeConfig()) -> Transformer:
    """With a gated LoRA of rank 3 that training could have made."""
    return perturb(add_gated_lora(shifted(family, rope=rope), 3, seed=0))


def outputs(model: Transformer, tokens_BT: Tensor = TOKENS, noisy_BT: Tensor | None = NOISY) -> Tensor:
    """Logits; context is read causally, what is behind it as one block."""
    positions_BT = torch.arange(LENGTH).expand_as(tokens_BT)
    mask = block_causal_mask(LENGTH, LENGTH, LENGTH, context=CONTEXT)[None]
    return model.head(model(tokens_BT, positions_BT, DenseAttend(mask), noisy_BT=noisy_BT))


@torch.no_grad()
def logits(model: Transformer, tokens_BT: Tensor = TOKENS, noisy_BT: Tensor | None = NOISY) -> Tensor:
    return outputs(model, tokens_BT, noisy_BT)


def gradients(model: Transformer, rows_BT: Tensor) -> dict[str, Tensor | None]:
    """Of a loss in some rows."""
    model.zero_grad(set_to_none=True)
    outputs(model)[rows_BT].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def names_of_updates(num_layers: int) -> set[str]:
    layers = [f"blocks.{i}.{layer}" for i in range(num_layers) for layer in LAYERS]
    return {"mask_vector"} | {f"{layer}.gated_{side}" for layer in layers for side in ("in", "out")}


# --- what is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_closed_rows_never_change_and_open_rows_start_unchanged(family: str, dtype: torch.dtype) -> None:
    parent = shifted(family, dtype)
    before, plain = logits(parent), logits(parent, TOKENS[1:], None)
    child = add_gated_lora(parent, 3, seed=0)
    assert {parameter.dtype for parameter in child.parameters()} == {dtype}
    assert torch.equal(logits(child), before)
    after = logits(perturb(child))
    assert torch.equal(after[~NOISY], before[~NOISY])
    assert ((after - before)[NOISY].abs().amax(-1) > 0.1).all()
    assert torch.equal(logits(child, TOKENS[1:], None), plain)


def test_a_layer_adds_its_update_in_open_rows() -> None:
    layer = GatedLoraLinear(5, 7, bias=True, rank=2).double()
    for matrix in (layer.gated_in, layer.gated_out):
        torch.nn.init.normal_(matrix, generator=torch.Generator().manual_seed(0))
    x, open_ = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[True, False, True], [False, False, True]])
    plain = x @ layer.weight.T + layer.bias
    for at, gate in enumerate(open_.flatten()):
        row = x.flatten(0, 1)[at]
        expected = layer.weight @ row + layer.bias + float(gate) * (layer.gated_out @ (layer.gated_in @ row))
        torch.testing.assert_close(layer(x, open_).flatten(0, 1)[at], expected)
    torch.testing.assert_close(layer(x), plain)


def test_open_rows_read_the_mask_vector_for_a_mask() -> None:
    child, other = add_gated_lora(shifted("llama"), 3, seed=0), shifted("llama")
    assert child.mask_vector is not None
    vector = torch.randn(child.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        child.mask_vector.copy_(vector)
        other.embed.weight[MASK] = vector
        expected = logits(other)
        assert torch.equal(logits(child), expected)
        child.embed.weight[MASK] = float("nan")
    assert torch.equal(logits(child), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_autoregressive_parent_is_got_back(family: str) -> None:
    rope = RopeConfig(kind="yarn", factor=4.0, original_max_positions=32)
    original = tiny_model(family, rope=rope)
    expected = logits(original)
    child = gated(family, rope)
    parent = reconfigured(child, parent_config(child.config))
    assert parent.config == original.config
    # To the parent the mask is a token like any other.
    assert torch.equal(logits(parent), expected)
    weights = child.state_dict()
    assert all(weight.data_ptr() == weights[name].data_ptr() for name, weight in parent.state_dict().items())
    with refused(ConfigError, "gated LoRA"):
        reconfigured(parent, parent_config(parent.config))


# --- what learns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_only_updates_and_the_mask_vector_learn_and_only_from_open_rows(family: str) -> None:
    child = gated(family)
    updates = names_of_updates(child.config.num_layers)
    for again in (False, True):
        model = train_gated_lora(child.requires_grad_(True)) if again else child
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == updates
    of_noisy, of_clean = gradients(child, NOISY), gradients(child, ~NOISY)
    assert {name for name, gradient in of_noisy.items() if gradient is not None} == updates
    assert all(gradient.count_nonzero() > 0 for gradient in of_noisy.values() if gradient is not None)
    assert all(gradient.count_nonzero() == 0 for gradient in of_clean.values() if gradient is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_leaves_the_parents_weights_alone(family: str) -> None:
    parent = shifted(family)
    before = copy.deepcopy(parent.state_dict())
    child = add_gated_lora(parent, 3, seed=0)
    optimizer = torch.optim.SGD([parameter for parameter in child.parameters() if parameter.requires_grad], lr=0.1)
    assert gradients(child, NOISY)["mask_vector"] is not None
    optimizer.step()
    for model in (parent, child):
        state = model.state_dict()
        assert [name for name, weight in before.items() if not torch.equal(state[name], weight)] == []
    assert all(parameter.requires_grad for parameter in parent.parameters())


def test_the_seed_decides_what_updates_read() -> None:
    parent = shifted("qwen3")
    first, again, other = (add_gated_lora(parent, 3, seed=seed).state_dict() for seed in (5, 5, 6))
    for name in names_of_updates(parent.config.num_layers):
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (not name.endswith("gated_in"))
    assert not torch.equal(first["blocks.0.mlp.down.gated_in"], first["blocks.1.mlp.down.gated_in"])


def test_activation_checkpointing_changes_no_gradient() -> None:
    child = gated("qwen2")
    plain = gradients(child, NOISY)
    child.activation_checkpointing = True
    for name, gradient in gradients(child, NOISY).items():
        expected = plain[name]
        assert (gradient is None) == (expected is None)
        assert gradient is None or expected is None or torch.equal(gradient, expected)


# --- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(family: str, tmp_path: Path) -> None:
    child = gated(family)
    save_model(child, tmp_path / "child")
    back = load_model(tmp_path / "child", dtype=torch.float32)
    assert back.config == child.config
    assert back.config.gated_lora_rank == 3
    state, expected = back.state_dict(), child.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(logits(back), logits(child))
    # Beside the parent's tensors, under the parent's names.
    save_model(reconfigured(child, parent_config(child.config)), tmp_path / "parent")
    named, plain = (load_file(tmp_path / folder / "model.safetensors") for folder in ("child", "parent"))
    added = {f"gated.blocks.{i}.{layer}.{side}" for i in range(2) for layer in LAYERS for side in ("in", "out")}
    assert named.keys() - plain.keys() == added | {"gated.mask_vector"}
    assert all(torch.equal(named[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["gated.mask_vector", "gated.blocks.1.attention.qkv.in", "gated.blocks.0.mlp.down.out"])
def test_a_missing_or_misshaped_tensor_is_named(name: str, tmp_path: Path) -> None:
    save_model(gated(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][..., 1:].contiguous()}, path)
    with refused(CheckpointError, "shape", name):
        load_model(tmp_path, dtype=torch.float32)
    del tensors[name]
    save_file(tensors, path)
    with refused(CheckpointError, "missing", name):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("attempt", "names"),
    [
        (lambda: tiny_config("llada2", **SHIFTED, gated_lora_rank=2), ("dense", "shifted")),
        (lambda: tiny_config("llama", mask_id=MASK, block_size=4, gated_lora_rank=2), ("dense", "shifted")),
        (lambda: tiny_config("llama", gated_lora_rank=2), ("dense", "shifted")),
        (lambda: tiny_config("llama", **SHIFTED, gated_lora_rank=0), ("gated_lora_rank", 0)),
        (lambda: add_gated_lora(shifted("llada2"), 2, seed=0), ("dense", "shifted")),
        (lambda: add_gated_lora(tiny_model("llama"), 2, seed=0), ("dense", "shifted")),
        (lambda: add_gated_lora(shifted("llama"), 0, seed=0), ("gated_lora_rank", 0)),
        (lambda: add_gated_lora(gated(), 2, seed=0), ("rank", 3)),
        (lambda: read_config(write_config(gated().config) | {"gated_lora_rank": "3"}), ("gated_lora_rank", "'3'")),
        (lambda: replace(gated().config, start_id=None), ("dense", "shifted")),
    ],
)  # fmt: skip
def test_what_cannot_have_a_gated_lora_is_refused(attempt: Callable[[], object], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        attempt()
