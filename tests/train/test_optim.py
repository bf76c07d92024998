"""The optimiser: float32 masters whatever the model computes in, and the learning-rate schedule."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from unmask.train.optim import MasterAdamW, learning_rate
from unmask.train.sections import TrainSection


def test_float32_equals_torch_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = MasterAdamW(ours.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    for _ in range(5):
        x = torch.randn(7, 4)
        for layer in (ours, theirs):
            layer(x).square().mean().backward()
        optimizer.step(0.01)
        reference.step()
        reference.zero_grad()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-7)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-7)


def test_bfloat16_updates_are_not_lost_to_rounding() -> None:
    layer = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = MasterAdamW(layer.named_parameters(), betas=(0.0, 0.0), weight_decay=0.0)
    for _ in range(40):
        (-layer(torch.ones(1, 2, dtype=torch.bfloat16))).sum().backward()
        optimizer.step(1e-4)  # below half a bfloat16 step at 1.0
    assert optimizer.parameters[0].dtype == torch.float32
    assert torch.allclose(optimizer.parameters[0], torch.full((1, 2), 1.004), atol=1e-4)
    assert (layer.weight > 1).all()


def test_bfloat16_gradients_accumulate_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = MasterAdamW(layer.named_parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    layer(torch.full((1, 1), 256.0, dtype=torch.bfloat16)).sum().backward()
    for _ in range(64):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()  # 256 + 1 is 256 in bfloat16
    assert optimizer.parameters[0].grad is not None
    assert optimizer.parameters[0].grad.item() == 320.0
    assert layer.weight.grad is None


def test_frozen_parameters_are_left_alone() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    optimizer = MasterAdamW(layer.named_parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    assert [parameter.shape for parameter in optimizer.parameters] == [layer.weight.shape]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_the_next_updates_exactly(dtype: torch.dtype) -> None:
    def run(steps: int, layer: nn.Linear, optimizer: MasterAdamW, start: int = 0) -> None:
        for step in range(start, start + steps):
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
            layer(x).square().mean().backward()
            optimizer.step(0.01)

    def fresh() -> tuple[nn.Linear, MasterAdamW]:
        torch.manual_seed(1)
        layer = nn.Linear(3, 2).to(dtype)
        return layer, MasterAdamW(layer.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)

    whole, whole_optimizer = fresh()
    run(3, whole, whole_optimizer)
    saved = {name: tensor.clone() for name, tensor in whole_optimizer.state_tensors().items()}
    run(3, whole, whole_optimizer, start=3)
    again, again_optimizer = fresh()
    again_optimizer.load_state_tensors(saved)
    run(3, again, again_optimizer, start=3)
    assert torch.equal(whole.weight, again.weight)
    assert torch.equal(whole.bias, again.bias)


def test_learning_rate_schedule() -> None:
    def rate(step: int, progress: float, schedule: Literal["constant", "cosine", "linear"]) -> float:
        train = TrainSection(tokens=100, learning_rate=1.0, warmup_steps=4, schedule=schedule, final_lr_share=0.1)
        return learning_rate(train, step, round(100 * progress))

    assert [rate(step, 0.0, "constant") for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(99, 1.0, "cosine") == pytest.approx(0.1)
    assert rate(99, 0.5, "cosine") == pytest.approx(0.55)
    assert rate(99, 0.5, "linear") == pytest.approx(0.55)
    assert rate(99, 0.25, "cosine") > rate(99, 0.25, "linear")
    assert rate(99, 2.0, "linear") == pytest.approx(0.1)
