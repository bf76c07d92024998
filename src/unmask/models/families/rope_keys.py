"""Rotary settings in a Hugging Face config, in the spelling of transformers 4 and of transformers 5.

Owns the keys `rope_theta`, `rope_scaling`, `rope_parameters` and `partial_rotary_factor`, both ways. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from unmask.errors import ConfigError
from unmask.models.arch.config import RopeConfig, RopeKind
from unmask.models.families.hf_values import number

ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})
_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_BY_KIND: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip
# Bookkeeping that transformers adds to any scaling, read only by the kinds that list it above.
_HARMLESS = {"original_max_position_embeddings", "factor"}


def read_rope(hf: Mapping[str, Any], *, max_positions: int, default_fraction: float) -> RopeConfig:
    """The rotary settings of `hf`.

    Args:
        hf: parsed config.json.
        max_positions: `max_position_embeddings`, YaRN's fallback for the original length.
        default_fraction: rotating share of the head when the config is silent.

    Raises:
        ConfigError: an unknown kind, an unknown key beside it, or a missing or non-numeric value.
    """
    scaling = _scaling(hf)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise ConfigError(f"rope type is {kind!r}; it must be one of {', '.join(get_args(RopeKind))}")
    unknown = sorted(set(scaling) - _COMMON - _BY_KIND[kind] - (_HARMLESS if kind == "default" else set()))
    if unknown:
        raise ConfigError(f"rope key {unknown[0]}={scaling[unknown[0]]!r} is not supported with rope type '{kind}'")
    if scaling.get("truncate") is False:
        raise ConfigError("rope key truncate=False is not supported; remove it or use truncated YaRN")
    theta = number(scaling, "rope_theta", number(hf, "rope_theta", 10_000.0))
    fraction = number(scaling, "partial_rotary_factor", number(hf, "partial_rotary_factor", default_fraction))
    if kind == "default":
        return RopeConfig(theta=theta, fraction=fraction)
    if kind == "linear":
        return RopeConfig(theta=theta, fraction=fraction, kind="linear", factor=_required(scaling, "factor"))
    original = int(number(scaling, "original_max_position_embeddings", float(max_positions)))
    if kind == "llama3":
        return RopeConfig(
            theta=theta, fraction=fraction, kind="llama3", factor=_required(scaling, "factor"),
            original_max_positions=original, low_freq_factor=_required(scaling, "low_freq_factor"),
            high_freq_factor=_required(scaling, "high_freq_factor"),
        )  # fmt: skip
    factor = number(scaling, "factor", max_positions / max(original, 1))
    return RopeConfig(
        theta=theta, fraction=fraction, kind="yarn", factor=factor, original_max_positions=original,
        beta_fast=number(scaling, "beta_fast", 32.0), beta_slow=number(scaling, "beta_slow", 1.0),
        attention_factor=_attention_factor(scaling, factor),
    )  # fmt: skip


def write_rope(rope: RopeConfig, *, default_fraction: float) -> dict[str, Any]:
    """The keys of `rope` as transformers 4 spells them: transformers 5 and the models' remote code read that too."""
    keys: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.fraction != default_fraction or default_fraction != 1.0:
        keys["partial_rotary_factor"] = rope.fraction
    if rope.kind == "default":
        return keys
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    keys["rope_scaling"] = scaling
    return keys


def _scaling(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    merged: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = hf.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}; it must be an object or null")
        if any(isinstance(part, Mapping) for part in value.values()):
            raise ConfigError(f"{key} differs by layer type ({', '.join(value)}); one rope for all layers is supported")
        merged |= value
    return merged


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float | None:
    if scaling.get("attention_factor") is not None:
        return _required(scaling, "attention_factor")
    if not scaling.get("mscale") or not scaling.get("mscale_all_dim"):
        return None
    log_factor = 0.1 * math.log(factor) if factor > 1 else 0.0
    return (_required(scaling, "mscale") * log_factor + 1) / (_required(scaling, "mscale_all_dim") * log_factor + 1)


def _required(scaling: Mapping[str, Any], key: str) -> float:
    if scaling.get(key) is None:
        raise ConfigError(f"rope scaling {dict(scaling)} lacks '{key}'; add it")
    return number(scaling, key, 0.0)
