"""Rotary keys in the spellings of transformers 4 and 5."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from unmask.errors import ConfigError
from unmask.models.arch.config import RopeConfig
from unmask.models.families.rope_keys import read_rope, write_rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(hf: dict[str, Any]) -> RopeConfig:
    return read_rope(hf, max_positions=1024, default_fraction=1.0)


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("default", {}),
        ("linear", {"factor": 2.0}),
        ("llama3", LLAMA3),
        ("yarn", {"factor": 2.0, "original_max_position_embeddings": 512, "beta_fast": 16}),
    ],
)
def test_both_spellings_agree(kind: str, scaling: dict[str, Any]) -> None:
    old = read({"rope_theta": 5e5, "rope_scaling": {"type": kind, **scaling}})
    new = read({"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **scaling}})
    assert old == new
    assert (old.kind, old.theta) == (kind, 5e5)


@given(
    theta=st.floats(1e3, 1e7),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    factor=st.floats(1.0, 64.0),
    kind=st.sampled_from(["default", "linear", "llama3", "yarn"]),
    default_fraction=st.sampled_from([0.5, 1.0]),
)
def test_round_trip(theta: float, fraction: float, factor: float, kind: str, default_fraction: float) -> None:
    scaled: dict[str, Any] = {} if kind == "default" else {"factor": factor}
    if kind in ("llama3", "yarn"):
        scaled["original_max_positions"] = 256
    if kind == "yarn":
        scaled["attention_factor"] = 1.25
    rope = RopeConfig(theta=theta, fraction=fraction, kind=kind, **scaled)  # type: ignore[arg-type]
    written = write_rope(rope, default_fraction=default_fraction)
    assert read_rope(written, max_positions=1024, default_fraction=default_fraction) == rope


def test_yarn_falls_back_to_the_positions() -> None:
    rope = read({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 256}})
    assert rope.factor == 4.0
    assert read({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}).original_max_positions == 1024


LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("hf", "names"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope type", "'dynamic'", "default")),
        ({"rope_scaling": {"type": "linear"}}, ("'factor'",)),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, ("factor", "'two'")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "short_factor": 1}}, ("short_factor=1",)),
        ({"rope_scaling": {"type": "default", "mrope_section": 16}}, ("mrope_section=16",)),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, ("truncate=False",)),
        ({"rope_scaling": "yarn"}, ("rope_scaling", "'yarn'")),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("layer type",)),
        ({"rope_theta": -1.0}, ("rope theta", -1.0)),
        ({"rope_theta": float("nan")}, ("rope_theta", "nan", "finite")),
        ({"rope_theta": 10**400}, ("rope_theta", "finite")),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            ("original_max_positions", 0),
        ),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}}, ("original_max_positions", 0)),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1e300}},
            ("original_max_positions",),
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0}}, ("beta_fast", 0)),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1}, ("rope theta", 1)),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 0}}, ("low_freq_factor", 0)),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ("low_freq_factor", "high_freq_factor")),
    ],
)
def test_refusals_name_key_and_value(hf: dict[str, Any], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        read(hf)
