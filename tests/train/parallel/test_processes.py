"""The pool: results by rank, failures and hangs by rank, and a pool that is usable afterwards."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from processes import Pool, RanksFailed


def sum_of_ranks(offset: int) -> tuple[int, int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), torch.get_num_threads(), float(total)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("out of paper")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)


def test_ranks_run_as_one_group(pool: Pool) -> None:
    assert pool.run(2, sum_of_ranks, 1) == [(0, 1, 3.0), (1, 1, 3.0)]
    assert [total for _, _, total in pool.run(4, sum_of_ranks, 0)] == [6.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [fail_on, hang_on, die_on])
def test_a_rank_in_trouble_is_named_and_the_pool_goes_on(pool: Pool, trouble: object) -> None:
    with pytest.raises(RanksFailed) as caught:
        pool.run(2, trouble, 1, timeout=1.0)  # type: ignore[arg-type]
    assert 1 in caught.value.errors
    assert pool.run(2, sum_of_ranks, 0) == [(0, 1, 1.0), (1, 1, 1.0)]
