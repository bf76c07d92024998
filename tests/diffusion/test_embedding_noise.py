"""Noise on the embedding of masked positions: where, how large, and whose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny import MASK, pack, text
from unmask.diffusion.corrupt import CorruptionConfig, Stream, corrupt, embedding_noise

CONFIG = CorruptionConfig(MASK, 4, complementary=True)
HIDDEN = 64


def by_identity(stream: Stream, noise: Tensor) -> dict[tuple[int, int, int, int], Tensor]:
    """The noise vector of every masked token, by (epoch, ordinal, position, copy)."""
    at = torch.nonzero(stream.tokens_BT == MASK)
    fields = (stream.epoch_BT, stream.ordinal_BT, stream.position_BT, stream.index.copy_BT)
    return {tuple(int(field[r, c]) for field in fields): noise[r, c] for r, c in at.tolist()}


def test_only_masked_positions_get_noise() -> None:
    stream = corrupt(pack([[text(30, 0, prompt=5), text(9, 1)], [text(20, 2)]], 40), CONFIG, 0)
    noise = embedding_noise(stream, MASK, HIDDEN, 1.5, 0)
    assert noise.dtype == torch.float32
    assert noise.shape == (*stream.tokens_BT.shape, HIDDEN)
    assert torch.equal((noise != 0).any(-1), stream.tokens_BT == MASK)


@pytest.mark.parametrize("norm", [0.25, 3.0])
def test_noise_is_gaussian_with_the_wanted_norm(norm: float) -> None:
    stream = corrupt(pack([[text(500, 0)], [text(500, 1)]], 500), CONFIG, 0)
    noise = embedding_noise(stream, MASK, HIDDEN, norm, 7)[stream.tokens_BT == MASK].double()
    assert len(noise) == 1000
    lengths = noise.norm(dim=-1)
    assert float(lengths.mean()) == pytest.approx(norm, rel=0.02)
    unit = (noise / (norm / HIDDEN**0.5)).flatten()
    assert float(unit.mean()) == pytest.approx(0, abs=4 / len(unit) ** 0.5)
    assert float((unit**2).mean()) == pytest.approx(1, abs=0.03)
    assert float((unit**4).mean()) == pytest.approx(3, abs=0.15)
    correlation = torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()
    assert float(correlation) < 0.2, "dimensions are independent"
    neighbours = (noise[1:] * noise[:-1]).sum(-1) / (lengths[1:] * lengths[:-1])
    assert float(neighbours.mean()) == pytest.approx(0, abs=0.02), "positions are independent"


def test_a_token_gets_the_same_noise_in_another_batch_and_every_copy_its_own() -> None:
    first, second = text(17, 5, epoch=2), text(11, 6, epoch=2)
    one = corrupt(pack([[first, second]], 30), CONFIG, 0)
    other = corrupt(pack([[text(3, 9)], [second], [first]], 20), CONFIG, 0)
    expected = by_identity(one, embedding_noise(one, MASK, HIDDEN, 1.0, 0))
    found = by_identity(other, embedding_noise(other, MASK, HIDDEN, 1.0, 0))
    assert len(expected) == 28
    for name, vector in expected.items():
        assert torch.equal(found[name], vector)
    vectors = torch.stack(list(found.values()))
    assert len(torch.unique(vectors, dim=0)) == len(found)


@pytest.mark.parametrize("change", ["seed", "epoch", "ordinal", "copy"])
def test_the_identity_counts_every_part(change: str) -> None:
    """One token in a block of one is masked in every corruption, so that only the named part differs."""
    config = CorruptionConfig(MASK, 1)
    stream = corrupt(pack([[text(1, 4)]], 1), config, 0)
    base = embedding_noise(stream, MASK, HIDDEN, 1.0, 0)[0, 0]
    if change == "seed":
        other = embedding_noise(stream, MASK, HIDDEN, 1.0, 1)[0, 0]
    elif change == "copy":
        stream.index.copy_BT.add_(1)
        other = embedding_noise(stream, MASK, HIDDEN, 1.0, 0)[0, 0]
    else:
        doc = text(1, 4, epoch=1) if change == "epoch" else text(1, 5)
        other = embedding_noise(corrupt(pack([[doc]], 1), config, 0), MASK, HIDDEN, 1.0, 0)[0, 0]
    assert float((base - other).abs().max()) > 1e-3


def test_no_masks_no_noise() -> None:
    stream = corrupt(pack([[text(6, 0, prompt=6)]], 6), CONFIG, 0)
    assert not embedding_noise(stream, MASK, HIDDEN, 1.0, 0).any()
