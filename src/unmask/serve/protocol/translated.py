"""`TranslatedRequest`: a body of another API for conversations, which is translated into a `ChatRequest`.

Owns what those APIs share: decoding options pass through, and errors about the chat request name the client's fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from pydantic import ValidationError, model_validator

from unmask.serve.errors import ApiError
from unmask.serve.protocol.chat import ChatRequest
from unmask.serve.protocol.fields import Sampling, conflict
from unmask.serve.validation import invalid_body


class TranslatedRequest(Sampling):
    """Fields that such bodies share.

    Attributes:
        stream: send the answer as it is written.
        RENAMED: patterns of a chat request's fields, and what the client calls them.
    """

    stream: bool | None = None

    RENAMED: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="after")
    def _watches_nothing(self) -> Self:
        if self.diffusion.watch:
            raise conflict("diffusion.watch", "this API has no events for it; leave it out, or use /v1/chat/completions")
        return self

    def to_chat(self, **fields: Any) -> ChatRequest:
        """A chat request with these fields, and the decoding options of this body.

        Raises:
            ApiError: a field does not fit.
        """
        options = self.model_dump(include=set(Sampling.model_fields), exclude_none=True)
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return ChatRequest.model_validate(options | given)
        except ValidationError as error:
            raise invalid_body(error) from error

    @classmethod
    @contextmanager
    def naming_fields(cls) -> Iterator[None]:
        """Errors about the chat request name this body's fields."""
        try:
            yield
        except ApiError as error:
            param, message = error.param, str(error)
            for pattern, name in cls.RENAMED.items():
                param = None if param is None else re.sub(rf"^{pattern}", name, param)
                message = re.sub(rf"^{pattern}", name, message)
            raise ApiError(error.status, message, param=param, code=error.code, headers=error.headers) from error
