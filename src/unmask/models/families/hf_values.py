"""Typed values of a Hugging Face config.json.

Owns what a value of each type may look like, and the errors that say so. Knows no key's meaning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from unmask.errors import ConfigError, UnmaskWarning


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number; without a default the key must be there."""
    value = optional_integer(hf, key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json lacks '{key}'; it is required for family '{hf.get('model_type')}'")
    return value


def optional_integer(hf: Mapping[str, Any], key: str) -> int | None:
    """A whole number, or None where the key is absent."""
    value = hf.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{key} is {value!r}; it must be an integer")
    return value


def number(hf: Mapping[str, Any], key: str, default: float) -> float:
    """A number, or the default."""
    value = hf.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{key} is {value!r}; it must be a finite number")
    return float(value)


def flag(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false, or the default."""
    value = hf.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; it must be true or false")
    return value


def token(hf: Mapping[str, Any], key: str) -> int | None:
    """A token's id; None where there is none, which some published configs spell -1."""
    value = hf.get(key)
    return None if value == -1 else optional_integer(hf, key)


def eos(hf: Mapping[str, Any], *, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a text, of which a config names one or several.

    One beyond the vocabulary, which no model can choose, is left out with a warning.
    """
    value = hf.get("eos_token_id")
    named = (token({"eos_token_id": one}, "eos_token_id") for one in (value if isinstance(value, list) else [value]))
    ids = dict.fromkeys(id_ for id_ in named if id_ is not None)
    outside = [id_ for id_ in ids if not 0 <= id_ < vocab_size]
    if outside:
        text = f"eos_token_id {outside[0]} is outside the vocabulary (0..{vocab_size - 1}); nothing ends with it"
        warnings.warn(text, UnmaskWarning, stacklevel=1)
    return tuple(id_ for id_ in ids if id_ not in outside)
