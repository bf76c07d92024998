"""`ServerConfig`: limits, keys and names of a server.

Owns their ranges. Knows neither the model nor HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

from unmask.errors import ConfigError


@dataclass(frozen=True)
class ServerConfig:
    """Limits, keys and names of a server.

    Attributes:
        name: model name that clients use; None: the name under which it was loaded.
        api_keys: accepted API keys; without any, no key is needed.
        max_concurrent: completions decoded together (`max_num_seqs` of the engine).
        max_queue: completions that may wait beside those.
        timeout: seconds that a request may take, waiting included.
        shutdown_grace: seconds that running requests have to finish when the server stops.
        max_body: bytes of a request body.
        default_max_tokens: new tokens of a chat completion that sets no limit.
        cache_tokens: tokens that the KV cache holds; None: the engine's default.
        allow_origins: web origins besides the server's own that may use it; "*" is any.
        allow_hosts: accepted values of the Host header; without any, all are accepted, except that a server without keys
            on a loopback address accepts loopback names only.
        log_prompts: write prompts and answers into the log.

    Raises:
        ConfigError: a value out of range.
    """

    name: str | None = None
    api_keys: tuple[str, ...] = ()
    max_concurrent: int = 16
    max_queue: int = 64
    timeout: float = 600.0
    shutdown_grace: float = 30.0
    max_body: int = 4 * 2**20
    default_max_tokens: int = 1024
    cache_tokens: int | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_concurrent", "max_body", "default_max_tokens", "cache_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_queue", "shutdown_grace"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be finite and at least 0")
        if not self.timeout > 0:
            raise ConfigError(f"timeout is {self.timeout}; it must be positive")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ConfigError("api_keys holds a key that is empty, not ASCII or surrounded by white space; use another key")
