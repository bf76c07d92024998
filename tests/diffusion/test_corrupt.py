"""Which tokens are masked, at what rate, with what weight: laws, partitions and independence of the layout of rows."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from tiny import MASK, Doc, Rows, pack, text
from unmask.diffusion.corrupt import CorruptionConfig, MaskSampling, NoisyCopy, block_ids, noisy_copies
from unmask.diffusion.schedule import Bandwidth
from unmask.errors import ConfigError

SAMPLINGS: tuple[MaskSampling, ...] = ("bernoulli", "fixed_count")


@st.composite
def documents(draw: st.DrawFn, most: int = 4) -> list[Doc]:
    """Documents with any pattern of maskable tokens, distinct identities, not in order."""
    ordinals = draw(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=most, unique=True))
    return [
        Doc((5,) * len(pattern), tuple(pattern), ordinal, draw(st.integers(0, 2)))
        for ordinal in ordinals
        for pattern in [draw(st.lists(st.booleans(), min_size=1, max_size=12))]
    ]


configs = st.builds(
    CorruptionConfig,
    mask_id=st.just(MASK),
    block_size=st.sampled_from([None, 1, 2, 3, 4, 8]),
    bandwidth=st.sampled_from([Bandwidth(), Bandwidth(0.3, 0.8)]),
    complementary=st.booleans(),
    sampling=st.sampled_from(SAMPLINGS),
)


def one_row(docs: list[Doc], extra: int = 0) -> Rows:
    return pack([docs], sum(len(doc.tokens) for doc in docs) + extra)


def by_document(rows: Rows, copies: list[NoisyCopy]) -> dict[tuple[int, int], list[list[tuple[bool, float, float]]]]:
    """What each document got: (masked, rate, weight) of every maskable token, copy by copy."""
    return {
        name: [
            [
                (bool(copy.masked_RL[row, i]), float(copy.t_RL[row, i]), float(copy.weight_RL[row, i]))
                for i in range(at.start, at.stop)
                if rows.maskable_RL[row, i]
            ]
            for copy in copies
        ]
        for name, at, row in rows.places()
    }


@given(documents(), configs, st.integers(0, 100))
def test_only_maskable_tokens_are_masked(docs: list[Doc], config: CorruptionConfig, seed: int) -> None:
    rows = one_row(docs, extra=3)
    copies = noisy_copies(rows, config, seed)
    assert len(copies) == config.num_copies == (2 if config.complementary and config.block_size != 1 else 1)
    for copy in copies:
        assert copy.masked_RL.dtype == torch.bool
        assert not (copy.masked_RL & ~rows.maskable_RL).any()


@given(documents(), configs, st.integers(0, 100))
def test_a_pair_partitions_the_maskable_tokens(docs: list[Doc], config: CorruptionConfig, seed: int) -> None:
    rows = one_row(docs, extra=2)
    copies = noisy_copies(rows, config, seed)
    times_masked = sum(copy.masked_RL.int() for copy in copies)
    if config.num_copies == 2:
        assert torch.equal(times_masked, rows.maskable_RL.int())
        first, second = copies
        torch.testing.assert_close((first.t_RL + second.t_RL)[rows.maskable_RL], torch.ones(int(rows.maskable_RL.sum())))
    elif config.sampling == "fixed_count" or config.block_size == 1:
        for _, at, row in rows.places():
            block = block_ids(rows.position_RL, config.block_size)[row, at]
            for number in block[rows.maskable_RL[row, at]].unique():
                assert copies[0].masked_RL[row, at][block == number].any(), "an empty mask teaches nothing"


@given(documents(), configs, st.integers(0, 100))
def test_predictions_have_a_finite_positive_weight(docs: list[Doc], config: CorruptionConfig, seed: int) -> None:
    for copy in noisy_copies(one_row(docs), config, seed):
        weight = copy.weight_RL[copy.masked_RL]
        assert torch.isfinite(weight).all()
        assert (weight > 0).all()


@given(documents(), configs, st.integers(0, 100), st.randoms(use_true_random=False))
def test_a_document_is_corrupted_the_same_in_every_packing(
    docs: list[Doc], config: CorruptionConfig, seed: int, random: object
) -> None:
    together = one_row(docs)
    expected = by_document(together, noisy_copies(together, config, seed))
    for doc in docs:
        alone = one_row([doc], extra=1)
        assert by_document(alone, noisy_copies(alone, config, seed)).items() <= expected.items()
    shuffled = list(docs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    split = pack([shuffled[::2], shuffled[1::2]], 60)
    assert by_document(split, noisy_copies(split, config, seed)) == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("change", ["seed", "epoch", "ordinal"])
def test_other_identities_get_other_masks(sampling: MaskSampling, change: str) -> None:
    config = CorruptionConfig(MASK, 8, sampling=sampling)
    base = one_row([text(200, 0)])
    other = {
        "seed": base,
        "epoch": one_row([text(200, 0, epoch=1)]),
        "ordinal": one_row([text(200, 1)]),
    }[change]
    first = noisy_copies(base, config, 0)[0]
    second = noisy_copies(other, config, 1 if change == "seed" else 0)[0]
    assert 0.2 < float((first.masked_RL != second.masked_RL).float().mean()) < 0.8


@given(documents(), st.integers(0, 100), st.booleans(), st.sampled_from(SAMPLINGS))
def test_blocks_of_one_are_masked_whole_with_weight_one(
    docs: list[Doc], seed: int, complementary: bool, sampling: MaskSampling
) -> None:
    rows = one_row(docs)
    config = CorruptionConfig(MASK, 1, Bandwidth(0.3, 0.8), complementary, sampling)
    (copy,) = noisy_copies(rows, config, seed)
    assert torch.equal(copy.masked_RL, rows.maskable_RL)
    assert (copy.t_RL[copy.masked_RL] == 1).all()
    assert (copy.weight_RL[copy.masked_RL] == 1).all()


@pytest.mark.parametrize(("block_size", "blocks"), [(4, 5), (8, 3), (None, 1)])
def test_every_block_has_one_rate_of_its_own(block_size: int | None, blocks: int) -> None:
    rows = one_row([text(20, 3), text(20, 4)])
    (copy,) = noisy_copies(rows, CorruptionConfig(MASK, block_size), 0)
    block = block_ids(rows.position_RL, block_size)
    seen: list[float] = []
    for _, at, row in rows.places():
        for number in block[row, at].unique():
            (rate,) = copy.t_RL[row, at][block[row, at] == number].unique().tolist()
            seen.append(rate)
    assert len(set(seen)) == len(seen) == 2 * blocks
    torch.testing.assert_close(copy.weight_RL, 1 / copy.t_RL)


def test_blocks_count_from_the_start_of_the_document() -> None:
    rows = one_row([text(3, 0), text(5, 1)])
    assert block_ids(rows.position_RL, 2).tolist() == [[0, 0, 1, 0, 0, 1, 1, 2]]
    assert block_ids(rows.position_RL, None).tolist() == [[0] * 8]


def test_bernoulli_masks_with_probability_t() -> None:
    rows = pack([[text(64, n)] for n in range(400)], 64)
    (copy,) = noisy_copies(rows, CorruptionConfig(MASK, 16), 5)
    decile = (copy.t_RL * 10).ceil().long() - 1
    for number in range(10):
        here = decile == number
        rate = float(copy.t_RL[here].double().mean())
        sigma = (rate * (1 - rate) / int(here.sum())) ** 0.5
        assert int(here.sum()) > 1000
        assert abs(float(copy.masked_RL[here].double().mean()) - rate) < 4 * sigma


def subset_frequencies(
    config: CorruptionConfig, maskable: tuple[bool, ...], num_docs: int
) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], tuple[float, float]]]:
    """Over many one-block documents: how often each set of positions is masked (per document and copy), and the mean and
    standard error of `weight x [this set is masked]`."""
    rows = pack([[Doc((5,) * len(maskable), maskable, n)] for n in range(num_docs)], len(maskable))
    copies = noisy_copies(rows, config, 11)
    where = [i for i, yes in enumerate(maskable) if yes]
    code = torch.tensor([1 << i for i in range(len(maskable))])
    frequency, weighted = {}, {}
    for size in range(1, len(where) + 1):
        for subset in combinations(where, size):
            wanted = sum(1 << i for i in subset)
            hits = [(copy.masked_RL * code).sum(1) == wanted for copy in copies]
            values = sum(
                torch.where(hit, copy.weight_RL[:, subset[0]].double(), 0.0) for hit, copy in zip(hits, copies, strict=True)
            ) / len(copies)
            frequency[subset] = sum(float(hit.double().mean()) for hit in hits) / len(copies)
            weighted[subset] = (float(values.mean()), float(values.std()) / num_docs**0.5)
    return frequency, weighted


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("maskable", [(True,), (True, True, True), (True, False, True, True, True)])
def test_weighted_masks_have_the_law_of_the_elbo(
    sampling: MaskSampling, complementary: bool, maskable: tuple[bool, ...]
) -> None:
    """`E[w(t) 1(S is masked)] = int_0^1 t^(k-1) (1 - t)^(m-k) dt = 1 / (k C(m, k))` for every set S of k of m tokens."""
    m = sum(maskable)
    config = CorruptionConfig(MASK, 8, complementary=complementary, sampling=sampling)
    _, weighted = subset_frequencies(config, maskable, 6000)
    assert len(weighted) == 2**m - 1
    for subset, (mean, error) in weighted.items():
        exact = 1 / (len(subset) * comb(m, len(subset)))
        assert error < 0.3 * exact
        assert abs(mean - exact) < 4.5 * error + 1e-3 * exact, f"{subset}: {mean} instead of {exact}"


def test_fixed_count_draws_every_count_and_every_set_equally_often() -> None:
    maskable = (True, False, True, True, True)
    frequency, _ = subset_frequencies(CorruptionConfig(MASK, 8, sampling="fixed_count"), maskable, 8000)
    for size in range(1, 5):
        expected = 1 / (4 * comb(4, size))
        for subset, found in frequency.items():
            if len(subset) == size:
                assert abs(found - expected) < 4 * (expected / 8000) ** 0.5
    assert sum(frequency.values()) == pytest.approx(1.0)


def test_fixed_count_weighs_by_maskable_over_masked() -> None:
    rows = one_row([text(40, n, prompt=3) for n in range(6)])
    (copy,) = noisy_copies(rows, CorruptionConfig(MASK, 8, sampling="fixed_count"), 2)
    block = block_ids(rows.position_RL, 8)
    for _, at, row in rows.places():
        for number in range(5):
            here = (block[row, at] == number) & rows.maskable_RL[row, at]
            masked = copy.masked_RL[row, at] & here
            share = float(masked.sum()) / float(here.sum())
            assert copy.t_RL[row, at][masked].tolist() == pytest.approx([share] * int(masked.sum()))
            assert copy.weight_RL[row, at][masked].tolist() == pytest.approx([1 / share] * int(masked.sum()))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_bandwidth_bounds_the_masked_share(sampling: MaskSampling) -> None:
    rows = pack([[text(100, n)] for n in range(200)], 100)
    config = CorruptionConfig(MASK, None, Bandwidth(0.3, 0.8), sampling=sampling)
    share = noisy_copies(rows, config, 0)[0].masked_RL.float().mean(1)
    slack = 0.01 if sampling == "fixed_count" else 0.2
    assert 0.3 - slack <= float(share.min()) < 0.4
    assert 0.7 < float(share.max()) <= 0.8 + slack
    assert float(share.mean()) == pytest.approx(0.55, abs=0.02)


@pytest.mark.parametrize("block_size", [0, -1])
def test_impossible_block_sizes_are_refused(block_size: int) -> None:
    with refused(ConfigError, "block size", block_size):
        CorruptionConfig(MASK, block_size)
