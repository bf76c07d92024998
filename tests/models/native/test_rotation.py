"""The rotation of hidden states is orthogonal, leaves the model's function alone, and tames outliers."""

from __future__ import annotations

import pytest
import torch

from unmask.models.native.rotation import Rotation, hadamard, mix, mixed_channels


@pytest.mark.parametrize("size", [1, 2, 9, 16, 67, 576, 640, 2048])
def test_is_orthogonal(size: int) -> None:
    matrix = Rotation(size)(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)
    # No entry stands out: an outlier in one channel is spread over all.
    assert matrix.abs().max() <= 2 / size**0.5


def test_reading_and_writing_matrices_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, read, write, norm = (torch.randn(*s, generator=generator) for s in ((5, 48), (7, 48), (48, 7), (48,)))
    rotation = Rotation(48)
    torch.testing.assert_close(rotation(x) @ rotation.inputs(read, norm).T, (x * norm) @ read.T, atol=1e-4, rtol=1e-4)
    y = torch.randn(5, 7, generator=generator)
    torch.testing.assert_close(y @ rotation.outputs(write).T, rotation(y @ write.T), atol=1e-4, rtol=1e-4)


def test_an_outlier_is_spread() -> None:
    x = torch.randn(576, generator=torch.Generator().manual_seed(0))
    x[77] = 500.0
    assert Rotation(576)(x).abs().max() < 60.0


@pytest.mark.parametrize(("ffn_size", "count"), [(1536, 8), (128, 8), (64, 4), (48, 1), (75, 1)])
def test_mixing_undoes_itself(ffn_size: int, count: int) -> None:
    assert mixed_channels(ffn_size) == count
    x = torch.randn(3, ffn_size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mix(mix(x, count), count) / count, x)


def test_hadamard_rows_are_orthogonal() -> None:
    assert torch.equal(hadamard(8) @ hadamard(8), 8 * torch.eye(8))
