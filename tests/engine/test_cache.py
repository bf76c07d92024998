"""The key-value cache: what stays, what does not, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiny import tiny_config
from unmask.engine.cache import KVCache
from unmask.errors import RequestError
from unmask.models.attention import sdpa

CONFIG = tiny_config("llama")


def heads(seed: int, length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, count, length, 8, generator=generator) for count in (4, 2, 2))
    return q, k, v


def test_committed_tokens_are_seen_before_this_forwards_own() -> None:
    cache = KVCache(CONFIG, 9, dtype=torch.float32)
    (_, k1, v1), (_, k2, v2), (q3, k3, v3) = heads(1, 4), heads(2, 3), heads(3, 2)
    for k, v in ((k1, v1), (k2, v2)):
        for layer in range(CONFIG.num_layers):
            cache.extend(layer, k + layer, v - layer)
        cache.commit(k.shape[2])
    assert cache.length == 7
    for layer in range(CONFIG.num_layers):
        keys = torch.cat((k1 + layer, k2 + layer, k3), 2)
        values = torch.cat((v1 - layer, v2 - layer, v3), 2)
        mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(4)) < 0.7
        for chosen in (None, mask):
            found = cache.attend(chosen)(layer, q3, k3, v3)
            torch.testing.assert_close(found, sdpa(q3, keys, values, chosen))


def test_a_denoising_pass_leaves_no_trace() -> None:
    cache, untouched = (KVCache(CONFIG, 8, dtype=torch.float32) for _ in range(2))
    (_, k, v), (q, k2, v2) = heads(1, 3), heads(2, 2)
    for each in (cache, untouched):
        each.extend(0, k, v)
        each.commit(3)
    for seed in range(3, 6):
        cache.attend()(0, *heads(seed, 5))
    assert cache.length == 3
    assert torch.equal(cache.attend()(0, q, k2, v2), untouched.attend()(0, q, k2, v2))


def test_a_commit_may_keep_a_part() -> None:
    cache = KVCache(CONFIG, 8, dtype=torch.float32)
    _, k, v = heads(1, 6)
    cache.extend(0, k, v)
    cache.commit(4)
    _, k2, v2 = heads(2, 1)
    keys, values = cache.extend(0, k2, v2)
    assert torch.equal(keys, torch.cat((k[:, :, :4], k2), 2))
    assert torch.equal(values, torch.cat((v[:, :, :4], v2), 2))


def test_the_capacity_is_the_limit() -> None:
    cache = KVCache(CONFIG, 6, dtype=torch.float32)
    _, k, v = heads(1, 4)
    cache.extend(0, k, v)
    cache.commit(4)
    cache.extend(0, k[:, :, :2], v[:, :, :2])
    with pytest.raises(RequestError) as error:
        cache.extend(0, k[:, :, :3], v[:, :, :3])
    assert str(error.value) == "7 tokens do not fit a cache of 6; make it larger"
    with pytest.raises(AssertionError, match="commit beyond the cache"):
        cache.commit(3)


def test_rows_can_leave() -> None:
    cache = KVCache(CONFIG, 5, batch=3, dtype=torch.float64)
    _, k, v = (part.double() for part in heads(1, 4, batch=3))
    cache.extend(1, k, v)
    cache.commit(4)
    cache.keep_rows(torch.tensor([0, 2]))
    _, k2, v2 = (part.double() for part in heads(2, 1, batch=2))
    keys, values = cache.extend(1, k2, v2)
    assert keys.dtype == torch.float64
    assert torch.equal(keys, torch.cat((k[[0, 2]], k2), 2))
    assert torch.equal(values, torch.cat((v[[0, 2]], v2), 2))
