"""`ApiKey`: a key that opens the server, with the limits of whoever has it; read from a keys file.

Owns the file's form. Knows neither HTTP nor what a limit counts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from unmask.errors import ConfigError

_Limit = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class ApiKey:
    """A key.

    Attributes:
        name: of its owner, in logs and of what is stored; never the key.
        digest: SHA-256 of the key.
        requests_per_minute: POST requests; None: the server's limit.
        tokens_per_minute: of prompts and completions; likewise.
        admin: whether it may change what is served.
    """

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    admin: bool = True


class _Entry(BaseModel):
    """An entry of a keys file: `key`, or the `sha256` of it, so that the file holds no secret."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    key: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    admin: bool = False


_ENTRIES = TypeAdapter(Annotated[list[_Entry], Field(min_length=1)])


def plain_key(key: str) -> ApiKey:
    """A key given as such; its name is the beginning of its digest.

    Raises:
        ConfigError: nobody could send it.
    """
    _check_key(key, "api_keys")
    digest = hashlib.sha256(key.encode())
    return ApiKey(f"key-{digest.hexdigest()[:8]}", digest.digest())


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file: a YAML list of `name`, `key` or `sha256`, and if wanted `requests_per_minute`, `tokens_per_minute`
    and `admin`.

    Raises:
        ConfigError: unreadable, or an entry that is wrong; the message holds no key.
    """
    try:
        entries = _ENTRIES.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read keys_file {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"keys_file {path} is not YAML; it holds a list of name, key and limits") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"keys_file {path}: {where}: {first['msg']}; an entry has name, key and limits") from None
    return tuple(_api_key(entry, path) for entry in entries)


def check_unique(keys: Sequence[ApiKey]) -> None:
    """Raises: ConfigError: two keys are equal, or have one name."""
    for name, count in Counter(key.name for key in keys).items():
        if count > 1:
            raise ConfigError(f"two keys are named {name}; names and keys are unique")
    if len({key.digest for key in keys}) < len(keys):
        raise ConfigError("a key is given twice; names and keys are unique")


def _api_key(entry: _Entry, path: Path) -> ApiKey:
    if (entry.key is None) == (entry.sha256 is None):
        raise ConfigError(f"keys_file {path}: {entry.name} needs either key or sha256")
    if entry.key is None:
        digest = bytes.fromhex(entry.sha256 or "")
    else:
        _check_key(entry.key, f"keys_file {path}: {entry.name}")
        digest = hashlib.sha256(entry.key.encode()).digest()
    return ApiKey(entry.name, digest, entry.requests_per_minute, entry.tokens_per_minute, entry.admin)


def _check_key(key: str, where: str) -> None:
    if not key or not key.isascii() or key != key.strip():
        raise ConfigError(f"{where} holds a key that is empty, not ASCII or surrounded by white space; use another key")
