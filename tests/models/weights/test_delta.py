"""Decoding a difference file: plain float32 arithmetic, refused when it does not belong or is damaged."""

from __future__ import annotations

import math

import pytest
import torch
from delta_encoder import decode_delta, encode_delta

from helpers import refused
from unmask.errors import CheckpointError
from unmask.models.weights.delta import Delta, fingerprint

Tensors = dict[str, torch.Tensor]


def pair() -> tuple[Tensors, Tensors]:
    """A base and a tuned model."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(64, 33, generator=generator), "norm": torch.rand(17, generator=generator)}
    return base, {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


def test_decoding_is_plain_float32_arithmetic() -> None:
    """levels * scale, rounded, plus base, rounded: recomputed here so that a fused or wider variant would show."""
    base, tuned = pair()
    delta = Delta(encode_delta(base, tuned))
    decoded = delta.apply("w", base["w"])
    step_RC = (decoded - base["w"]).double()
    nonzero = step_RC.abs() > 0
    smallest_R = torch.where(nonzero, step_RC.abs(), math.inf).min(1).values
    ratio = step_RC / smallest_R[:, None]
    assert (ratio[nonzero].abs() < 3.2).all()
    assert (ratio - ratio.round()).abs()[nonzero].max() < 0.02


def test_another_base_is_refused() -> None:
    base, tuned = pair()
    encoded = encode_delta(base, tuned)
    other = {**base, "norm": base["norm"] + 1e-6}
    with refused(CheckpointError, "base", "sha256"):
        decode_delta(encoded, other)


def test_fingerprint_sees_names_shapes_and_values_but_not_order() -> None:
    base, _ = pair()
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))
    assert fingerprint(base) != fingerprint({"v": base["w"], "norm": base["norm"]})
    assert fingerprint(base) != fingerprint({**base, "w": base["w"].reshape(33, 64)})
    assert fingerprint({"w": base["w"].bfloat16()}) == fingerprint({"w": base["w"].bfloat16().float()})


@pytest.mark.parametrize("place", [0, 9, 40, -200, -1], ids=["magic", "length", "header", "payload", "digest"])
def test_a_flipped_bit_anywhere_is_refused(place: int) -> None:
    base, tuned = pair()
    damaged = bytearray(encode_delta(base, tuned))
    damaged[place] ^= 4
    with pytest.raises(CheckpointError, match=r"not a delta file|damaged or cut short"):
        Delta(bytes(damaged))


@pytest.mark.parametrize("keep", [0, 8, 11, 60, -1])
def test_a_cut_file_is_refused(keep: int) -> None:
    base, tuned = pair()
    with pytest.raises(CheckpointError, match=r"not a delta file|damaged or cut short"):
        Delta(encode_delta(base, tuned)[:keep])
