"""`ServerConfig`: limits, keys and names of a server.

Owns their ranges and help; the options of `unmask serve` are generated from the fields. Knows neither the model nor HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.serve.keys import ApiKey, check_unique, plain_key, read_keys


def _setting(default: Any, help: str, default_text: str = "") -> Any:
    """A field; `default_text` says what an empty default amounts to."""
    return field(default=default, metadata={"help": help, "default_text": default_text})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits, keys and names of a server.

    Raises:
        ConfigError: a value out of range.
    """

    names: tuple[str, ...] = _setting((), "Model name that clients use; repeatable: the first is the name in answers.", "MODEL")
    api_keys: tuple[str, ...] = _setting((), "API key that clients must send; repeatable.", "no key needed")
    keys_file: Path | None = _setting(
        None, "YAML file of further keys: a list of name, key (or its sha256), and limits; SIGHUP reads it again."
    )
    requests_per_minute: int | None = _setting(None, "POST requests a minute of each key that sets no limit.", "any number")
    tokens_per_minute: int | None = _setting(None, "Tokens a minute, of prompts and completions, likewise.", "any number")
    loras: tuple[str, ...] = _setting((), "LoRA adapter of the model to serve as MODEL:NAME, NAME=FOLDER; repeatable.", "none")
    lora_folder: Path | None = _setting(
        None, "Folder whose adapters clients may load and unload (/v1/load_lora_adapter).", "clients may not"
    )
    max_loras: int = _setting(8, "Adapters that are loaded, or still used by a request.")
    max_lora_rank: int = _setting(64, "Rank of an adapter that clients load.")
    max_concurrent: int = _setting(16, "Completions decoded together.")
    max_queue: int = _setting(1024, "Completions that may wait beside those; more get status 429.")
    timeout: float = _setting(600.0, "Seconds that a request may take, waiting included.")
    shutdown_grace: float = _setting(30.0, "Seconds to finish running requests at Ctrl-C or SIGTERM.")
    max_connections: int = _setting(2048, "Open connections; beyond, those are closed that have waited longest.")
    max_body: int = _setting(4 * 2**20, "Bytes of a request body.")
    files: Path | None = _setting(None, "Folder of uploaded files and of batches.", "no files and batches are taken")
    max_file: int = _setting(200 * 2**20, "Bytes of an uploaded file.")
    max_stored: int = _setting(10 * 2**30, "Bytes of all files together.")
    max_tokens: int = _setting(1024, "New tokens of a chat completion that sets no limit.")
    cache_tokens: int | None = _setting(None, "Tokens that the KV cache holds.", "what fits 1 GiB")
    allow_origins: tuple[str, ...] = _setting(
        (), 'Web origin that may use the server (CORS), "*" for any; repeatable.', "the server's own"
    )
    allow_hosts: tuple[str, ...] = _setting(
        (), "Accepted value of the Host header; repeatable.", "any; loopback names on a loopback address without keys"
    )
    kv_events: str | None = _setting(
        None, "ZeroMQ address that tells routers what the prefix cache holds, in vLLM's KV events: tcp://*:5557.", "none"
    )
    kv_events_replay: str | None = _setting(None, "ZeroMQ address where they ask for events that they have missed.", "none")
    kv_events_topic: str = _setting("", "Topic of the events.", "empty")
    strict: bool = _setting(False, "Refuse unknown fields of requests, which are otherwise ignored and named in a header.")
    log_prompts: bool = _setting(False, "Log prompts and answers.")
    audit_log: Path | None = _setting(None, "File of a JSON line for every request: who, what, when; no texts.", "none")

    def __post_init__(self) -> None:
        least_one = (
            "max_loras",
            "max_lora_rank",
            "max_concurrent",
            "max_body",
            "max_tokens",
            "cache_tokens",
            "max_connections",
            "max_file",
            "max_stored",
        )
        for name in (*least_one, "requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_queue", "shutdown_grace"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be finite and at least 0")
        if not self.timeout > 0:
            raise ConfigError(f"timeout is {self.timeout}; it must be positive")
        if self.kv_events is None and (self.kv_events_replay is not None or self.kv_events_topic):
            raise ConfigError("kv_events_replay and kv_events_topic say how events are published; set kv_events, too")
        for each in self.loras:
            name, is_pair, folder = each.partition("=")
            if not (name and is_pair and folder):
                raise ConfigError(f"loras holds {each!r}; it must be NAME=FOLDER")
        if len({each.partition("=")[0] for each in self.loras}) < len(self.loras) or len(self.loras) > self.max_loras:
            raise ConfigError(
                f"loras holds {len(self.loras)} adapters; their names must differ, and max_loras is {self.max_loras}"
            )
        _ = self.keys

    @cached_property
    def keys(self) -> tuple[ApiKey, ...]:
        """Every key that opens the server when it starts; none: no key is needed."""
        return self.current_keys()

    def current_keys(self) -> tuple[ApiKey, ...]:
        """The same with the keys file as it is now.

        Raises:
            ConfigError: the file is wrong, or two keys or names are equal.
        """
        plain = tuple(plain_key(key) for key in dict.fromkeys(self.api_keys))
        keys = plain if self.keys_file is None else (*plain, *read_keys(self.keys_file))
        check_unique(keys)
        return keys
