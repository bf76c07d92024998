"""Layouts of tensor parallelism: parts of parameters and back, and that every parameter has one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import FAMILIES, MASK, tiny_model
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.weights.adapter import attach_lora
from unmask.train.parallel.layouts import Layout, tensor_layouts


@given(st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 1))
def test_parts_one_behind_the_other_are_the_parameter_again(size: int, lengths: list[int], dim: int) -> None:
    layout = Layout(dim, tuple(lengths))
    shape = (sum(lengths), 3) if dim == 0 else (3, sum(lengths))
    whole = torch.arange(1.0, 1 + 3 * sum(lengths)).view(shape)
    parts = [layout.part(whole, rank, size) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    assert torch.equal(layout.restore(torch.cat(parts, dim), size), whole)
    covered = sorted(place for rank in range(size) for start, stop in layout.spans(rank, size) for place in range(start, stop))
    assert covered == list(range(sum(lengths)))
    assert sum(int((part == 0).sum()) for part in parts) == 3 * (sum(layout.widths(size)) * size - sum(lengths))


def test_a_rank_holds_the_queries_keys_and_values_of_its_kv_heads() -> None:
    layout = tensor_layouts(tiny_model("llama"))["blocks.0.attention.qkv.weight"]
    assert layout.spans(1, 2) == [(16, 32), (40, 48), (56, 64)]
    assert tensor_layouts(tiny_model("llama"))["blocks.0.mlp.gate_up.weight"].spans(0, 2) == [(0, 24), (48, 72)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", ["full", "lora", "gated"])
def test_every_parameter_has_a_layout_but_those_that_every_rank_has(family: str, trained: str) -> None:
    changes = {"qkv_bias": True, "out_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny_model(family, mask_id=MASK, start_id=1, **changes)
    if trained == "lora":
        attach_lora(model, rank=2, alpha=2.0, seed=0, train_embedding=True)
    elif trained == "gated":
        if family == "llada2":
            pytest.skip("a mixture has no gated LoRA")
        model = add_gated_lora(model, 2, seed=0)
    layouts = tensor_layouts(model)
    without = {name for name, _ in model.named_parameters() if name not in layouts}
    routed = {f"blocks.{layer}.mlp.{name}" for layer in (1, 2) for name in ("router", "gate_up", "down")}
    assert without == (routed if family == "llada2" else {"mask_vector"} if trained == "gated" else set())
    for name, parameter in model.named_parameters():
        layout = layouts.get(name, Layout())
        if layout.dim is not None:
            assert sum(layout.sections) == parameter.shape[layout.dim], name
