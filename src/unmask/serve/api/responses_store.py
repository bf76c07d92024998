"""`ResponseStore`: finished responses and their conversations, for `previous_response_id` and references to items.

Owns their number: the most recently used within a number of bytes, in memory only; nobody sees another's. Knows no HTTP.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

MAX_BYTES = 64 * 2**20


class ResponseStore:
    """Responses by id.

    Args:
        max_bytes: of responses and conversations as JSON; the least recently used are dropped beyond.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        # The response, the items before it, and the owner; a conversation may be long, and is seldom asked for.
        self._entries: OrderedDict[str, tuple[str, str, str]] = OrderedDict()
        self._response_of_item: dict[str, str] = {}

    def put(self, owner: str, response: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
        """Keep a response.

        Args:
            owner: whose it is.
            response: OpenAI's object.
            items: the conversation that it answers.
        """
        entry = (json.dumps(response), json.dumps(items), owner)
        size = sum(map(len, entry))
        if size > self._max_bytes:
            return
        self._entries[response["id"]] = entry
        self._num_bytes += size
        self._response_of_item |= {item["id"]: response["id"] for item in response["output"]}
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, owner: str, id_: str) -> dict[str, Any] | None:
        """The response; None: unknown or dropped."""
        entry = self._entry(owner, id_)
        if entry is None:
            return None
        response: dict[str, Any] = json.loads(entry[0])
        return response

    def conversation(self, owner: str, id_: str) -> list[dict[str, Any]] | None:
        """The items of the conversation up to and with the response's output; None: unknown or dropped."""
        entry = self._entry(owner, id_)
        return None if entry is None else [*json.loads(entry[1]), *json.loads(entry[0])["output"]]

    def item(self, owner: str, id_: str) -> dict[str, Any] | None:
        """An item of some response's output; None: unknown or dropped."""
        response = self.get(owner, self._response_of_item.get(id_, ""))
        return None if response is None else next(item for item in response["output"] if item["id"] == id_)

    def delete(self, owner: str, id_: str) -> bool:
        """Forget a response; False: it was not there."""
        if self._entry(owner, id_) is None:
            return False
        self._drop(id_)
        return True

    def _drop(self, id_: str) -> None:
        entry = self._entries.pop(id_)
        self._num_bytes -= sum(map(len, entry))
        for item in json.loads(entry[0])["output"]:
            del self._response_of_item[item["id"]]

    def _entry(self, owner: str, id_: str) -> tuple[str, str, str] | None:
        entry = self._entries.get(id_)
        if entry is None or entry[2] != owner:
            return None
        self._entries.move_to_end(id_)
        return entry
