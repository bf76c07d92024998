"""Bodies of /v1/files and /v1/batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from unmask.serve.protocol.fields import Body

EXPIRY_SECONDS = (3600, 30 * 24 * 3600)
"""Least and most that a file may be kept, if not for ever."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
ShortText = Annotated[str, Field(max_length=512)]


class ExpiresAfter(Body):
    """When a file is forgotten."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=EXPIRY_SECONDS[0], le=EXPIRY_SECONDS[1])]


class BatchRequest(Body):
    """Body of /v1/batches."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/infill"]
    completion_window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}[smhd]$")]
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], ShortText], Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None

    @property
    def window_seconds(self) -> int:
        """Seconds in which the batch may be answered."""
        return int(self.completion_window[:-1]) * _UNITS[self.completion_window[-1]]
