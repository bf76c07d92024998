"""Block arithmetic and the Warmup-Stable-Decay schedule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from unmask.diffusion.blocks import BlockSchedule, Phase, num_blocks, wsd_schedule
from unmask.errors import ConfigError

SCHEDULE = BlockSchedule((Phase("warmup", 1, 10), Phase("warmup", 4, 20), Phase("stable", None, 100), Phase("decay", 32, 30)))


@given(st.integers(0, 200), st.integers(1, 40))
def test_blocks_cover_the_length_and_no_block_is_empty(length: int, size: int) -> None:
    count = num_blocks(length, size)
    assert (count - 1) * size < length <= count * size


@pytest.mark.parametrize(
    ("seen", "index"), [(0, 0), (9, 0), (10, 1), (29, 1), (30, 2), (129, 2), (130, 3), (159, 3), (160, 3), (10**9, 3)]
)
def test_a_phase_begins_when_the_ones_before_it_are_through(seen: int, index: int) -> None:
    assert SCHEDULE.index_at(seen) == index


@pytest.mark.parametrize(
    ("sizes", "row_length", "names"),
    [
        ((1, 4, 32), 100, ("row length", 100, "block size", 32, 96, 128)),
        ((4, 32), 30, ("row length", 30, "block sizes", 4, 32)),
        ((4, 6), 16, ("row length", 16, "block size", 6, 12, 24)),
        ((64, None), 100, ("row length", 100, "block size", 64, 128)),
    ],
)
def test_rows_that_a_block_size_does_not_divide_are_refused(
    sizes: tuple[int | None, ...], row_length: int, names: tuple[object, ...]
) -> None:
    schedule = BlockSchedule(tuple(Phase("warmup", size, 1) for size in sizes))
    with refused(ConfigError, *names):
        schedule.check_row_length(row_length)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 200))
def test_the_proposed_row_lengths_are_accepted(sizes: list[int], row_length: int) -> None:
    schedule = BlockSchedule(tuple(Phase("warmup", size, 1) for size in sizes))
    if all(row_length % size == 0 for size in sizes):
        schedule.check_row_length(row_length)
        return
    with pytest.raises(ConfigError) as error:
        schedule.check_row_length(row_length)
    for proposed in str(error.value).split("; use ")[1].split(" or "):
        schedule.check_row_length(int(proposed))


def test_full_sequence_phases_fit_every_row() -> None:
    assert BlockSchedule((Phase("stable", None, 5),)).check_row_length(17) is None


@pytest.mark.parametrize(
    ("phases", "names"),
    [
        ((), ("empty",)),
        ((Phase("warmup", 4, 0),), ("'warmup'", "tokens", 0)),
        ((Phase("decay", 0, 5),), ("'decay'", "block size", 0)),
        ((Phase("decay", -4, 5),), ("'decay'", "block size", -4)),
    ],
)
def test_impossible_phases_are_refused(phases: tuple[Phase, ...], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        BlockSchedule(phases)


def test_shares_become_tokens() -> None:
    schedule = wsd_schedule(1000, warmup=[(1, 1), (4, 2)], stable=5, decay=[(64, 1), (32, 1)])
    assert [(p.name, p.block_size, p.tokens) for p in schedule.phases] == [
        ("warmup", 1, 100),
        ("warmup", 4, 200),
        ("stable", None, 500),
        ("decay", 64, 100),
        ("decay", 32, 100),
    ]


def test_a_stable_share_of_zero_is_no_phase() -> None:
    schedule = wsd_schedule(10, warmup=[(1, 0.5), (4, 0.5)], stable=0, decay=[])
    assert [p.block_size for p in schedule.phases] == [1, 4]


@given(st.integers(100, 10**9), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=8), st.floats(0.05, 1.0))
def test_shares_add_up_to_the_run(total: int, shares: list[float], stable: float) -> None:
    warmup = [(2**i, share) for i, share in enumerate(shares)]
    schedule = wsd_schedule(total, warmup=warmup, stable=stable, decay=[])
    assert sum(phase.tokens for phase in schedule.phases) == total
    whole = sum(shares) + stable
    for phase, share in zip(schedule.phases, [*shares, stable], strict=True):
        assert abs(phase.tokens - total * share / whole) <= 1


def test_a_phase_without_a_token_is_refused_rather_than_silently_lengthened() -> None:
    with refused(ConfigError, "warmup", "block size", 1, 10):
        wsd_schedule(10, warmup=[(1, 1e-9)], stable=1.0, decay=[])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"warmup": [(4, 1.0), (4, 1.0)], "stable": 0, "decay": []}, ("warmup", [4, 4])),
        ({"warmup": [(4, 1.0), (1, 1.0)], "stable": 0, "decay": []}, ("warmup", [4, 1])),
        ({"warmup": [], "stable": 1, "decay": [(32, 1.0), (64, 1.0)]}, ("decay", [32, 64])),
        ({"warmup": [(1, 0.0)], "stable": 1, "decay": []}, ("warmup", "share", 0.0)),
        ({"warmup": [(1, -0.5)], "stable": 1, "decay": []}, ("warmup", "share", -0.5)),
        ({"warmup": [(1, 1.0)], "stable": -1, "decay": []}, ("stable", "share", -1)),
        ({"warmup": [(1, 1.0), (2, 1.0)], "stable": 1, "decay": []}, ("tokens", 2, 3)),
        ({"warmup": [], "stable": 0, "decay": []}, ("empty",)),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict[str, object], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        wsd_schedule(2, **arguments)  # type: ignore[arg-type]
