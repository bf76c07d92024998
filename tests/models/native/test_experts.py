"""Routing in the kernels: the choice of `arch.moe.route`, ties and all.

Legend: N rows, E experts, A active ones.
"""

from __future__ import annotations

from ctypes import byref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from unmask.engine.batch import Batch, SequenceSlice
from unmask.models.arch.config import MoEConfig
from unmask.models.arch.moe import TokenBlocks, route
from unmask.models.native import interface
from unmask.models.native.interface import Kernels
from unmask.models.native.packed import routing_of

# Many equal, and nearly equal, and so large that scores are.
LOGITS = (0.0, -0.0, 1.0, 1.0000001, -3.0, 17.0, 18.0, 90.0, -90.0, -1e4, 1e30, float("inf"), float("-inf"))
BIASES = (0.0, 0.05, -0.05, 1.0, -1.0, 1e-8)


def choose(
    kernels: Kernels, logits_NE: Tensor, bias_E: Tensor, moe: MoEConfig, batch: Batch | None = None
) -> tuple[Tensor, Tensor]:
    """`route` by the kernels; the rows are the tokens of `batch`, whose blocks count with an `expert_capacity`."""
    rows, shape = len(logits_NE), (len(logits_NE), moe.num_active)
    routing = routing_of(moe, mixed_channels=1)
    segments = np.zeros((0, 6), np.int64) if batch is None else batch.segments_C6
    step = interface.ForwardBatch(rows, len(segments), segments.ctypes.data)
    weights_NA, choice_NA = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
    buffer = torch.empty(kernels.route_bytes(byref(routing), rows, 1) + 64, dtype=torch.uint8)
    kernels.route(
        byref(routing), bias_E.data_ptr(), logits_NE.data_ptr(), byref(step), choice_NA.data_ptr(),
        weights_NA.data_ptr(), -(-buffer.data_ptr() // 64) * 64, 1,
    )  # fmt: skip
    return weights_NA, choice_NA


def assert_equals_torch(
    kernels: Kernels, logits_NE: Tensor, bias_E: Tensor, moe: MoEConfig, batch: Batch | None = None
) -> None:
    weights_NA, choice_NA = choose(kernels, logits_NE, bias_E, moe, batch)
    blocks = None if batch is None else TokenBlocks(batch.mask_block_T, int(batch.mask_block_T[-1]) + 1)
    expected_weights, expected = route(logits_NE, bias_E, moe, blocks)
    assert torch.equal(choice_NA, expected)
    torch.testing.assert_close(weights_NA, expected_weights, rtol=1e-6, atol=0)


@st.composite
def mixtures(draw: st.DrawFn) -> MoEConfig:
    groups = draw(st.sampled_from((1, 2, 4, 8)))
    size, active_groups = draw(st.integers(1, 8)), draw(st.integers(1, groups))
    return MoEConfig(
        num_experts=groups * size, num_active=draw(st.integers(1, active_groups * size)), expert_size=16, num_groups=groups,
        num_active_groups=active_groups, routed_scale=2.5, normalize=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=150)
@given(data=st.data(), moe=mixtures())
def test_the_choice_is_that_of_torch_with_ties(kernels: Kernels, data: st.DataObject, moe: MoEConfig) -> None:
    rows = data.draw(st.integers(1, 4))
    any_float = st.floats(-20, 20, width=32)
    logits = st.sampled_from(LOGITS) if data.draw(st.booleans()) else any_float
    biases = st.sampled_from(BIASES) if data.draw(st.booleans()) else st.floats(-1, 1, width=32)
    logits_NE = data.draw(arrays.arrays(np.float32, (rows, moe.num_experts), elements=logits))
    bias_E = data.draw(arrays.arrays(np.float32, moe.num_experts, elements=biases))
    assert_equals_torch(kernels, torch.from_numpy(logits_NE), torch.from_numpy(bias_E), moe)


@pytest.mark.parametrize("std", [0.0, 0.01, 1.0, 300.0])
def test_the_choice_is_that_of_torch_at_full_size(any_kernels: Kernels, std: float) -> None:
    """Logits on a grid, so that there are ties, and with such as differ in the last place."""
    moe = MoEConfig(num_experts=256, num_active=8, expert_size=16, num_groups=8, num_active_groups=4, routed_scale=2.5)
    generator = torch.Generator().manual_seed(0)
    logits_NE = torch.randn(2000, 256, generator=generator) * std
    logits_NE[500:1000].mul_(8).round_().div_(8)
    logits_NE[1000:, ::2] = torch.nextafter(logits_NE[1000:, 1::2], torch.zeros(()))
    for bias_E in (torch.zeros(256), torch.randn(256, generator=generator).mul_(20).round_().div_(200)):
        assert_equals_torch(any_kernels, logits_NE, bias_E, moe)


def slices(*parts: tuple[int, int, int, int]) -> Batch:
    """A batch of sequences (tokens, first position, block size, `causal_end`)."""
    return Batch([SequenceSlice([0] * count, start, (), size, end) for count, start, size, end in parts], 1)


def test_block_routing_chooses_as_torch_does_and_keeps_to_its_experts(any_kernels: Kernels) -> None:
    """Blocks of several sequences, cut at both ends, behind causal tokens."""
    moe = MoEConfig(
        num_experts=64, num_active=4, expert_size=16, num_groups=8, num_active_groups=4, expert_capacity=9, routed_scale=2.5
    )
    batch = slices((21, 6, 8, 0), (1, 3, 8, 0), (13, 30, 4, 35), (16, 0, 16, 0), (5, 2, 1, 0))
    generator = torch.Generator().manual_seed(0)
    for grid in (1, 4, 100):
        logits_NE = torch.randn(56, 64, generator=generator).mul_(grid).round_().div_(grid)
        bias_E = torch.randn(64, generator=generator).mul_(grid).round_().div_(10 * grid)
        assert_equals_torch(any_kernels, logits_NE, bias_E, moe, batch)
        choice_NA = choose(any_kernels, logits_NE, bias_E, moe, batch)[1]
        used = [choice_NA[batch.mask_block_T == block].unique() for block in batch.mask_block_T.unique()]
        assert max(map(len, used)) == 9
        assert len(used) == 4 + 1 + 5 + 3 + 1 + 5


def test_a_token_alone_is_routed_as_without_groups(kernels: Kernels) -> None:
    moe = MoEConfig(num_experts=16, num_active=3, expert_size=16, num_groups=4, num_active_groups=1, expert_capacity=3)
    logits_NE = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    _, choice_NA = choose(kernels, logits_NE, torch.zeros(16), moe, slices((1, 5, 8, 0)))
    assert torch.equal(choice_NA, logits_NE.topk(3).indices)
