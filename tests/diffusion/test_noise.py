"""Counter-based noise: the exact hash, its uniformity, and that each number depends on its own key only."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unmask.diffusion.noise import NoiseKey, mix, to_unit

TAGS = ("t", "mask", "count", "embedding", "sample", "replace")
WORD = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def python_mix(x: int) -> int:
    """SplitMix64's finaliser in unbounded integers, from the reference C code."""
    x &= WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def python_uniform(seed: int, epoch: int, tag_number: int, *counters: int) -> float:
    golden = 0x9E3779B97F4A7C15
    state = python_mix(python_mix(python_mix(seed) + epoch) + tag_number * golden)
    for counter in counters:
        state = python_mix(state * golden + counter)
    return (python_mix(state) >> 11) / 2**53


def one(seed: int, epoch: int, tag: str, *counters: int) -> float:
    return float(NoiseKey(seed, torch.tensor(epoch)).uniform(tag, *(torch.tensor(c) for c in counters)))


def chi_square(u: Tensor, bins: int) -> float:
    """Standard deviations by which the counts of `u` in equal bins are too uneven (about N(0, 1) for uniform `u`)."""
    counts = torch.bincount((u.flatten() * bins).long(), minlength=bins).double()
    expected = u.numel() / bins
    return float(((counts - expected) ** 2 / expected).sum() - (bins - 1)) / (2 * (bins - 1)) ** 0.5


@given(INT64)
def test_mix_is_splitmix64(x: int) -> None:
    assert int(mix(torch.tensor(x))) & WORD == python_mix(x)


@given(INT64)
def test_to_unit_keeps_the_top_bits_and_stays_below_one(x: int) -> None:
    unit = float(to_unit(torch.tensor(x)))
    assert unit == ((x & WORD) >> 11) / 2**53
    assert 0.0 <= unit < 1.0


@given(st.integers(0, 1 << 70), st.integers(0, 1 << 40), st.integers(0, 5), st.lists(INT64, min_size=1, max_size=3))
def test_uniform_is_the_written_hash(seed: int, epoch: int, tag: int, counters: list[int]) -> None:
    """Stored noise positions stay valid for ever: the hash may not change."""
    assert one(seed, epoch, TAGS[tag], *counters) == python_uniform(seed, epoch, tag + 1, *counters)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_draws_are_uniform_over_documents_positions_and_epochs(tag: str, seed: int) -> None:
    many = torch.arange(20_000)
    key = NoiseKey(seed, torch.zeros((), dtype=torch.int64))
    assert abs(chi_square(key.uniform(tag, many, 7), 64)) < 5
    assert abs(chi_square(key.uniform(tag, many << 20, 7), 64)) < 5
    assert abs(chi_square(key.uniform(tag, 7, many), 64)) < 5
    assert abs(chi_square(NoiseKey(seed, many).uniform(tag, 7, 7), 64)) < 5


def test_every_part_of_the_key_gives_independent_numbers() -> None:
    many = torch.arange(20_000)
    zero = torch.zeros((), dtype=torch.int64)
    streams = [
        NoiseKey(0, zero).uniform("mask", 0, many),
        NoiseKey(0, zero).uniform("mask", 1, many),
        NoiseKey(0, zero).uniform("t", 0, many),
        NoiseKey(1, zero).uniform("mask", 0, many),
        NoiseKey(0, zero + 1).uniform("mask", 0, many),
        NoiseKey(0, zero).uniform("mask", many, 0),
    ]
    for a, b in itertools.combinations(streams, 2):
        grid = (a[2:] * 8).floor() / 8 + b[2:] / 8  # uniform exactly if the pair is
        assert abs(chi_square(grid, 64)) < 5
    neighbours = (streams[0][:-1] * 8).floor() / 8 + streams[0][1:] / 8
    assert abs(chi_square(neighbours, 64)) < 5


@given(st.permutations(range(6)), st.integers(1, 6))
def test_a_draw_does_not_depend_on_its_neighbours(order: list[int], count: int) -> None:
    epoch, document = torch.arange(6) % 2, torch.arange(6) * 13
    whole = NoiseKey(3, epoch).uniform("mask", document, 5)
    part = torch.tensor(order[:count])
    assert torch.equal(NoiseKey(3, epoch[part]).uniform("mask", document[part], 5), whole[part])


def test_counters_broadcast() -> None:
    epoch, document, position = torch.tensor([[1], [2]]), torch.tensor([[10], [20]]), torch.arange(4)[None]
    grid = NoiseKey(9, epoch).uniform("mask", document, position)
    assert grid.shape == (2, 4)
    assert grid.dtype == torch.float64
    assert float(grid[1, 3]) == one(9, 2, "mask", 20, 3)


@given(st.lists(st.tuples(INT64, INT64, INT64), min_size=20, max_size=20), st.sampled_from(TAGS))
def test_many_numbers_are_those_of_each_alone(keys, tag):
    """Tensors and Python's integers compute the same."""
    seed_K, epoch_K, counter_K = torch.tensor(keys).unbind(-1)
    alone = [NoiseKey(seed, torch.tensor(epoch)).uniform(tag, counter, 3) for seed, epoch, counter in keys]
    assert torch.equal(NoiseKey(seed_K, epoch_K).uniform(tag, counter_K, 3), torch.stack(alone))
