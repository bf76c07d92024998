"""Encoding a difference file: small, exact where it must be, and models that do not match are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from delta_encoder import best_steps, decode_delta, encode_delta, pack_pairs
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from unmask.errors import CheckpointError
from unmask.models.weights.delta import unpack_pairs

Tensors = dict[str, torch.Tensor]


def pair(rows: int = 64, columns: int = 33, *, spread: float = 1e-3) -> tuple[Tensors, Tensors]:
    """A base and a tuned model whose rows changed by very different amounts."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(rows, columns, generator=generator), "norm": torch.rand(17, generator=generator)}
    scale_R1 = spread * torch.exp(2 * torch.randn(rows, 1, generator=generator))
    tuned = {
        "w": base["w"] + scale_R1 * torch.randn(rows, columns, generator=generator),
        "norm": base["norm"] + 1e-5 * torch.randn(17, generator=generator),
    }
    return base, tuned


def relative_error(base: Tensors, tuned: Tensors, decoded: Tensors) -> torch.Tensor:
    """Squared error of each row of `w`, as a share of its squared change."""
    wanted = (tuned["w"] - base["w"]).double()
    return (decoded["w"] - tuned["w"]).double().square().sum(1) / wanted.square().sum(1)


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.35), (3, 0.085), (4, 0.03)])
def test_every_row_is_close_whatever_its_scale(bits: int, bound: float) -> None:
    base, tuned = pair(columns=400)
    decoded = decode_delta(encode_delta(base, tuned, bits=bits), base)
    assert relative_error(base, tuned, decoded).max() < bound


def test_rows_use_the_best_step_for_gaussian_values() -> None:
    """The optimum for seven levels is known: 0.586 standard deviations with clipping at 3.5 steps costs at least 4.4%."""
    base, tuned = pair(rows=50, columns=20_000)
    decoded = decode_delta(encode_delta(base, tuned), base)
    error = relative_error(base, tuned, decoded)
    assert error.mean() < 0.0485
    assert error.min() > 0.04


def test_other_tensors_are_exact_bit_for_bit() -> None:
    base, tuned = pair()
    tuned["norm"][0] = -0.0
    tuned["stack"] = base["stack"] = torch.randn(2, 3, 4)
    decoded = decode_delta(encode_delta(base, tuned), base)
    for name in ("norm", "stack"):
        assert decoded[name].numpy().tobytes() == tuned[name].numpy().tobytes()
    assert decoded["w"].dtype == torch.float32


def test_an_unchanged_row_stays_bit_identical() -> None:
    base, tuned = pair()
    tuned["w"][5] = base["w"][5]
    tuned["w"][6:] = base["w"][6:]
    decoded = decode_delta(encode_delta(base, tuned), base)
    assert torch.equal(decoded["w"][5:], base["w"][5:])
    same = decode_delta(encode_delta(base, base), base)
    assert all(torch.equal(same[name], base[name]) for name in base)


def test_encoding_and_decoding_are_deterministic() -> None:
    base, tuned = pair()
    encoded = encode_delta(base, tuned)
    reordered = encode_delta(dict(reversed(base.items())), dict(reversed(tuned.items())))
    assert encoded == reordered
    first, second = decode_delta(encoded, base), decode_delta(encoded, base)
    assert all(first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first)


def test_max_bytes_is_kept_at_the_price_of_error() -> None:
    base, tuned = pair(rows=200, columns=400)
    free = encode_delta(base, tuned)
    limit = int(len(free) * 0.8)
    tight = encode_delta(base, tuned, max_bytes=limit)
    assert 0.93 * limit < len(tight) <= limit
    assert encode_delta(base, tuned, max_bytes=len(free)) == free
    errors = [relative_error(base, tuned, decode_delta(e, base)).mean() for e in (free, tight)]
    assert errors[0] < errors[1] < 0.15
    with refused(CheckpointError, "max_bytes=100"):
        encode_delta(base, tuned, max_bytes=100)


def test_size_is_near_the_entropy_of_the_levels() -> None:
    """SmolLM2-135M has 134.5M weights and must stay under 45 MB: 2.67 bits a weight in all."""
    base, tuned = pair(rows=576, columns=1536, spread=1.0)
    encoded = encode_delta(base, tuned)
    assert 8 * len(encoded) / (576 * 1536) < 2.67


def test_models_that_do_not_match_are_refused() -> None:
    base, tuned = pair()
    with refused(CheckpointError, "norm", "base"):
        encode_delta(base, {"w": tuned["w"]})
    with refused(CheckpointError, "w", [3, 33], [64, 33]):
        encode_delta(base, {**tuned, "w": tuned["w"][:3]})
    with refused(CheckpointError, "norm", "finite"):
        encode_delta(base, {**tuned, "norm": tuned["norm"] * math.nan})
    with refused(CheckpointError, "bits", 5):
        encode_delta(base, tuned, bits=5)


@given(max_level=st.sampled_from([1, 3, 7]), data=st.data())
def test_packing_is_invertible(max_level: int, data: st.DataObject) -> None:
    drawn = data.draw(st.lists(st.integers(-max_level, max_level), max_size=33))
    array = np.array(drawn, dtype=np.int8)
    packed = pack_pairs(array, max_level)
    assert len(packed) == (len(drawn) + 1) // 2
    assert np.array_equal(unpack_pairs(packed, len(drawn), max_level), array)


def test_steps_of_chunked_rows_are_those_of_single_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((4100, 8)).astype(np.float32)
    whole = best_steps(rows, 3)
    assert np.array_equal(whole[4095:4098], np.concatenate([best_steps(rows[i : i + 1], 3) for i in range(4095, 4098)]))


def test_tensors_that_the_base_has_not_are_all_difference() -> None:
    base, tuned = pair()
    new = torch.randn(20, 31, generator=torch.Generator().manual_seed(5))
    restored = decode_delta(encode_delta(base, {**tuned, "new": new, "vector": new[0]}, bits=4), base)
    assert torch.equal(restored["vector"], new[0])
    assert float((restored["new"] - new).norm() / new.norm()) < 0.15
    plain = decode_delta(encode_delta(base, tuned, bits=4), base)
    assert all(torch.equal(restored[name], tensor) for name, tensor in plain.items())
