"""The mixture of experts: shapes that do not depend on the data, batches in which experts or all rows are missing."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unmask.models.arch.config import MoEConfig
from unmask.models.arch.moe import MoE

CONFIG = MoEConfig(num_experts=8, num_active=2, expert_size=16, num_groups=4, num_active_groups=2)


def test_fake_tensors_pass_forward_and_backward() -> None:
    moe = MoE(32, CONFIG).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x_BTD = torch.empty(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
        moe(x_BTD).float().sum().backward()
        assert x_BTD.grad is not None
        assert x_BTD.grad.shape == x_BTD.shape
        assert moe.gate_up.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_rows_give_no_rows_and_zero_gradients(dtype: torch.dtype) -> None:
    moe = MoE(32, CONFIG).to(dtype)
    out = moe(torch.empty(0, 3, 32, dtype=dtype, requires_grad=True))
    assert out.shape == (0, 3, 32)
    out.sum().backward()
    for weight in (moe.gate_up, moe.down, moe.router):
        assert weight.grad is not None
        assert not weight.grad.any()
