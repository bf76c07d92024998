"""The kernels' pool of threads: what it computes does not depend on it, and a child process has one of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from unmask.models.native.interface import Kernels
from unmask.models.native.linear import PackedLinear
from unmask.models.native.packing import pack_matrix


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def linear(kernels: Kernels) -> tuple[PackedLinear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1000, 64, generator=generator), torch.randn(9, 64, generator=generator)
    return PackedLinear(pack_matrix(weight, 8), kernels), x


def running_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
def test_calls_share_one_pool(kernels: Kernels) -> None:
    product, x = linear(kernels)
    product(x)
    before = running_threads()
    callers = [threading.Thread(target=product, args=(x,)) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    deadline = time.monotonic() + 5  # the system may still list a thread that has been joined
    while running_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running_threads() <= before


@pytest.mark.usefixtures("threads")
def test_a_forked_process_starts_threads_of_its_own(kernels: Kernels) -> None:
    product, x = linear(kernels)
    expected = product(x)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(product(x), expected) and torch.equal(product(x), expected) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(product(x), expected)
