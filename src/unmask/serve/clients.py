"""`Client`: whoever has an API key, and what they may still ask in this minute.

Owns the rate limits, their headers, and finding a client by its key. Knows no route.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request as HttpRequest

from unmask.serve.errors import ApiError
from unmask.serve.keys import ApiKey

_KINDS = ("requests", "tokens")
RATE_HEADERS = tuple(f"x-ratelimit-{what}-{kind}" for kind in _KINDS for what in ("limit", "remaining", "reset"))
"""OpenAI's headers about the limits."""


class Bucket:
    """A token bucket: an allowance that refills evenly, `limit` a minute, and is full after a minute of rest.

    Args:
        limit: a minute.
        clock: seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self._clock = limit, clock
        self._level, self._at = float(limit), clock()

    @property
    def level(self) -> float:
        """What is left now."""
        now = self._clock()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / 60)
        self._at = now
        return self._level

    def seconds_until(self, count: float) -> float:
        """Until so much is there; at most until the bucket is full."""
        return max(0.0, min(count, self.limit) - self.level) * 60 / self.limit

    def take(self, count: float) -> None:
        """Take so much; give it back by a negative number."""
        self._level = min(self.limit, self.level - count)


class Client:
    """Whoever has a key, or everybody where there are no keys.

    Args:
        name: of the key's owner; empty: everybody.
        is_admin: may change what is served.
        requests_per_minute: POST requests; None: any number.
        tokens_per_minute: of prompts and completions; None: any number.
    """

    def __init__(
        self,
        name: str = "",
        *,
        is_admin: bool = False,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        self.name, self.is_admin = name, is_admin
        self.limits = (requests_per_minute, tokens_per_minute)
        limits = zip(_KINDS, self.limits, strict=True)
        self._buckets = {kind: Bucket(limit) for kind, limit in limits if limit is not None}

    def take_request(self) -> None:
        """Count a request.

        Raises:
            ApiError: the limit of this minute is reached.
        """
        self._take("requests", 1)

    def take_tokens(self, count: int) -> None:
        """Reserve the tokens of a prompt and of the longest completion.

        Raises:
            ApiError: they are more than this minute has left.
        """
        self._take("tokens", count)

    def give_tokens(self, count: int) -> None:
        """Give back what a completion did not use."""
        if "tokens" in self._buckets:
            self._buckets["tokens"].take(-count)

    def _take(self, kind: str, count: int) -> None:
        bucket = self._buckets.get(kind)
        if bucket is None:
            return
        if count > bucket.limit:
            message = f"the request needs {count} {kind}, and the limit is {bucket.limit} a minute; ask for fewer"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"x-should-retry": "false"})
        if count > bucket.level:
            seconds = math.ceil(bucket.seconds_until(count))
            message = f"the limit of {bucket.limit} {kind} a minute is reached; retry in {seconds} s"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})
        bucket.take(count)

    def headers(self) -> dict[str, str]:
        """OpenAI's headers about the limits."""
        found = {}
        for kind, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
            found[f"x-ratelimit-reset-{kind}"] = _duration(bucket.seconds_until(bucket.limit))
        return found


class Clients:
    """All clients of a server.

    Args:
        keys: theirs; without any, everybody is one client.
        requests_per_minute: of a client whose key sets no limit.
        tokens_per_minute: likewise.
    """

    def __init__(
        self, keys: Sequence[ApiKey] = (), *, requests_per_minute: int | None = None, tokens_per_minute: int | None = None
    ) -> None:
        self.need_key = bool(keys)
        self.everybody = Client(is_admin=not keys, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute)
        self._clients: dict[bytes, Client] = {}
        self.replace(keys)

    def replace(self, keys: Sequence[ApiKey]) -> None:
        """Know these keys from now on, and no others. Whose rights and limits stay keeps what this minute has left."""
        before = {client.name: client for client in self._clients.values()}
        self._clients = {key.digest: self._client(key, before.get(key.name)) for key in keys}

    def _client(self, key: ApiKey, before: Client | None) -> Client:
        requests, tokens = self.everybody.limits
        client = Client(
            key.name,
            is_admin=key.admin,
            requests_per_minute=key.requests_per_minute or requests,
            tokens_per_minute=key.tokens_per_minute or tokens,
        )
        if before is not None and (before.is_admin, before.limits) == (client.is_admin, client.limits):
            return before
        return client

    def find(self, sent: Sequence[str]) -> Client | None:
        """The client with one of these keys; compared in constant time."""
        digests = [hashlib.sha256(each.encode()).digest() for each in sent]
        matches = [client for known, client in self._clients.items() for each in digests if hmac.compare_digest(each, known)]
        return matches[0] if matches else None

    def named(self, name: str) -> Client | None:
        """The client of this name, if there is one still."""
        clients = self._clients.values() if self.need_key else (self.everybody,)
        return next((client for client in clients if client.name == name), None)


async def _owner(http: HttpRequest) -> str:
    client: Client = http.scope["unmask.client"]
    return client.name


Owner = Annotated[str, Depends(_owner)]
"""The name of the key that was sent, for what is stored."""


async def admin_only(http: HttpRequest) -> None:
    """A dependency of routes that change what is served.

    Raises:
        ApiError: the key may not.
    """
    client: Client = http.scope["unmask.client"]
    if not client.is_admin:
        raise ApiError(403, "this key may not change what is served; use one with admin: true", code="not_admin")


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 6s, 1m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
