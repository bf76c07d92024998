"""Sizes of packed weights: what is summed up from the config is what packing makes."""

from __future__ import annotations

import pytest
import torch

from tiny import tiny_config, tiny_model
from unmask.models.arch.config import MoEConfig
from unmask.models.native.packing import pack_model
from unmask.models.native.quantize import matrix_bytes, padded_depth
from unmask.models.native.sizes import matrix_sizes, packed_bytes, packing_bytes

GATED = {"gated_lora_rank": 16, "mask_id": 1, "block_size": 4, "start_id": 0}
EXPERTS = {"moe": MoEConfig(num_experts=16, num_active=2, expert_size=64)}


@pytest.mark.parametrize("bits", [8, 4, 32])
@pytest.mark.parametrize("changes", [{}, {"tied_head": True}, GATED, EXPERTS])
def test_packed_weights_take_about_what_is_summed_up(bits: int, changes: dict[str, object]) -> None:
    family = "llada2" if "moe" in changes else "llama"
    model = tiny_model(family, hidden_size=128, ffn_size=256, head_dim=32, vocab_size=512, **changes)
    packed = pack_model(model, bits)
    tensors = [getattr(matrix, name) for matrix in packed.matrices.values() for name in ("weight", "scale")]
    total = sum(tensor.nbytes for tensor in [*tensors, *packed.vectors.values()] if tensor is not None)
    assert packed_bytes(model.config, torch.float32, bits) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, GATED, EXPERTS])
def test_every_matrix_is_as_large_as_is_summed_up(bits: int, changes: dict[str, object]) -> None:
    family = "llada2" if "moe" in changes else "llama"
    model = tiny_model(family, hidden_size=72, ffn_size=88, head_dim=8, vocab_size=57, **changes)
    matrices, sizes = pack_model(model, bits).matrices, matrix_sizes(model.config)
    assert matrices.keys() == sizes.keys()
    for name, matrix in matrices.items():
        outputs, inputs = sizes[name]
        assert (matrix.outputs, matrix.depth) == (outputs, padded_depth(inputs, matrix.bits))
        assert matrix.num_bytes == matrix_bytes(outputs, inputs, matrix.bits)


def test_matrices_of_other_widths_count_as_such() -> None:
    config = tiny_config("llama", hidden_size=72)
    narrow, wide = (packed_bytes(config, torch.float32, bits) for bits in (4, 8))
    assert packed_bytes(config, torch.float32, 4, lambda name: 8) == wide
    assert narrow < packed_bytes(config, torch.float32, 4, lambda name: 8 if ".down" in name else 4) < wide


def test_quantising_takes_more_than_its_result() -> None:
    config = tiny_config("llama")
    layerwise, whole = (packing_bytes(config, torch.float32, 8, whole=whole) for whole in (False, True))
    assert packed_bytes(config, torch.float32, 8) < layerwise < whole
