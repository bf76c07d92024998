"""Calibration: the text moves through the layers as through the model, and rounded matrices say more nearly what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny import MASK, tiny_config, tiny_model
from unmask.diffusion.masks import block_causal_mask
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.arch.moe import TokenBlocks
from unmask.models.arch.transformer import Transformer
from unmask.models.native.calibration import Calibration
from unmask.models.native.packing import PackedSink, Packer, round_nearest
from unmask.models.native.quantize import GroupedMatrix, round_codes
from unmask.models.weights.checkpoint import parts_of


class Nowhere(PackedSink):
    """Forgets what it takes."""

    def put(self, name: str, part: torch.Tensor, first: int, rows: int) -> None:
        pass


ROWS = torch.randint(0, MASK, (10, 16), generator=torch.Generator().manual_seed(0))


def states(model: Transformer, tokens_RT: torch.Tensor, block_size: int = 1) -> torch.Tensor:
    """Hidden states before the final norm."""
    model.norm = torch.nn.Identity()  # type: ignore[assignment]
    length = tokens_RT.shape[1]
    mask = block_causal_mask(length, length, block_size)[None]
    blocks_RT = torch.arange(tokens_RT.numel()).view_as(tokens_RT) // block_size
    blocks = TokenBlocks(blocks_RT.flatten(), tokens_RT.numel() // block_size)
    positions_RT = torch.arange(length)[None].expand_as(tokens_RT)
    return model(tokens_RT, positions_RT, DenseAttend(mask), token_blocks=blocks)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llada2", "gated", "bfloat16"])
@torch.no_grad()
def test_unrounded_layers_do_what_the_model_does(kind: str) -> None:
    if kind == "gated":
        model = add_gated_lora(tiny_model("llama", mask_id=MASK, block_size=4, start_id=0), 3, seed=0)
    else:
        model = tiny_model(
            "llama" if kind == "bfloat16" else kind, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32
        )
    calibration = Calibration(parts_of(model), ROWS, lambda name: 8)
    expected = states(model_like(model), ROWS)
    for number in range(len(model.blocks)):
        calibration.next_layer(number)
        assert not calibration.rounded
        assert bool(calibration.importance) == (kind == "llada2" and number > 0)
    assert torch.allclose(calibration.hidden_RTD, expected, atol=1e-4, rtol=1e-4)


def model_like(model: Transformer) -> Transformer:
    """A copy, which calibration does not use up."""
    other = Transformer(model.config)
    other.load_state_dict(model.state_dict())
    other.inv_freq = model.inv_freq.float()
    return other.eval()


@torch.no_grad()
def test_tokens_of_a_block_share_their_experts() -> None:
    moe = tiny_config("llada2").moe
    assert moe is not None
    model = tiny_model("llada2", moe=replace(moe, expert_capacity=3), mask_id=MASK, block_size=4)
    calibration = Calibration(parts_of(model), ROWS, lambda name: 8)
    draws_RT = torch.rand(ROWS.shape, generator=torch.Generator().manual_seed(0))
    is_masked_RT = (draws_RT < 0.5) & (torch.arange(len(ROWS)) % 2 == 1)[:, None]
    expected = states(model_like(model), ROWS.masked_fill(is_masked_RT, MASK), 4)
    for number in range(len(model.blocks)):
        calibration.next_layer(number)
    torch.testing.assert_close(calibration.hidden_RTD, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_denoises_reads_masks_in_its_blocks() -> None:
    model = tiny_model("llama", mask_id=MASK, block_size=4)
    calibration = Calibration(parts_of(model), ROWS, lambda name: 8)
    is_masked = (calibration.hidden_RTD == model.embed.weight[MASK]).all(-1)
    assert not is_masked[::2].any()
    assert 0.3 < is_masked[1::2].float().mean() < 0.7
    expected = states(model_like(model), ROWS.masked_fill(is_masked, MASK), 4)
    for number in range(2):
        calibration.next_layer(number)
    assert torch.allclose(calibration.hidden_RTD, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llada2"])
def test_calibrated_matrices_lose_less(family: str) -> None:
    model = tiny_model(family, hidden_size=64, head_dim=16, ffn_size=96)
    exact = states(model_like(model), ROWS)
    losses = []
    for uses_gptq in (False, True):
        calibration = Calibration(parts_of(model_like(model)), ROWS, lambda name: 4, uses_gptq=uses_gptq)
        for number in range(len(model.blocks)):
            calibration.next_layer(number)
            assert f"blocks.{number}.qkv.base" in calibration.rounded
        losses.append((calibration.hidden_RTD - exact).norm().item())
    assert 0 < losses[1] < losses[0]


def test_experts_are_rounded_one_by_one_for_their_own_inputs() -> None:
    model = tiny_model("llada2")
    calibration = Calibration(parts_of(model_like(model)), ROWS, lambda name: 4)
    for number in range(2):
        calibration.next_layer(number)
    seen: dict[str, list[int]] = {}

    def rounding(name: str, rows: torch.Tensor, first: int, bits: int) -> GroupedMatrix:
        found = calibration.rounding(name, rows, first) if bits == 4 else None
        seen.setdefault(name, []).append(first)
        if ".experts." in name:
            assert found is not None
            assert not torch.equal(found.dequantize(), round_codes(rows).dequantize())
        return found or round_nearest(name, rows, first, bits)  # type: ignore[return-value]

    Packer(parts_of(model), 4, rounding=rounding).pack(2, Nowhere())
    assert seen["blocks.1.experts.gate_up.base"] == [32 * expert for expert in range(8)]
    assert seen["blocks.1.experts.down.base"] == [32 * expert for expert in range(8)]
