"""The study of roundings: better scales and GPTQ lose less, and a rotated model is the same function."""

from __future__ import annotations

import pytest
import torch
from quantization_study import Recipe, Rounding, Study, recipes, rotated, round_activations, round_matrix
from torch import Tensor

from tiny import causal_logits, tiny_model
from unmask.models.arch.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model("llama", hidden_size=64, ffn_size=128, head_dim=16)


def errors_of(*roundings: Rounding) -> list[float]:
    """Relative errors of a product with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(32, 64, generator=generator)
    expected, hessian = inputs @ weight.T, inputs.T @ inputs

    def error(rounded: Tensor) -> float:
        return float((inputs @ rounded.T - expected).norm() / expected.norm())

    return [error(round_matrix(weight, rounding, hessian)) for rounding in roundings]


def test_what_takes_more_effort_loses_less() -> None:
    row, peak, squares, gptq, eight = errors_of(
        Rounding(4), Rounding(4, 32), Rounding(4, 32, "squares"), Rounding(4, 32, "minimum", gptq=True), Rounding(8)
    )
    assert row > peak > squares > gptq > eight > 0
    minimum, multiple, unrounded = errors_of(Rounding(4, 32, "minimum"), Rounding(4, 32, "multiple"), Rounding(16))
    assert squares > minimum > gptq
    assert row > multiple > squares
    assert unrounded == 0


def test_activations_by_groups_lose_less() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) ** 3
    errors = [(round_activations(x, bits, group) - x).norm().item() for bits, group in [(8, 0), (8, 32), (12, 0)]]
    assert errors[0] > errors[1] > errors[2] > 0


def study_of(model: Transformer) -> Study:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 61, (24,), generator=generator) for _ in range(3)]
    return Study(model, [(texts[0], 4), (texts[1], 1)], texts[2:])


def test_a_rotated_model_is_the_same_function(model: Transformer) -> None:
    study = study_of(model)
    for rotate in (False, True):
        same, change, divergence = study.measure(Recipe(Rounding(16), Rounding(16), rotate=rotate, activations=None))
        assert same == 1.0
        assert abs(change) + abs(divergence) < 1e-3
    assert not torch.equal(rotated(model).embed.weight, model.embed.weight)


def test_recipes_are_measured_and_leave_the_model_alone(model: Transformer) -> None:
    before, study, known = causal_logits(model), study_of(model), recipes()
    names = ("int8 group 32, activations by 32", "int4 gptq 32, rotated, down in 8 bits", "int4 multiple 32")
    divergences = [study.measure(known[name])[2] for name in names]
    assert 0 < divergences[0] < min(divergences[1:])
    assert torch.equal(causal_logits(model), before)
