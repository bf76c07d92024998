"""Validation errors of bodies as API errors: one of them, with the field's name as OpenAI writes it."""

from __future__ import annotations

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from unmask.serve.errors import ApiError, bad_request

_UNION_MEMBERS = frozenset({"str", "int", "float", "bool", "constrained-str", "literal"})


def invalid_body(error: RequestValidationError | ValidationError) -> ApiError:
    """The error of a body that FastAPI has parsed, or that an API has translated into another."""
    # Every member of a union reports an error; that of the member whose type matches is the most specific.
    first: Any = max(error.errors(), key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
    parts = first["loc"][1:] if isinstance(error, RequestValidationError) else first["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts if _is_field(part))
    name = path.removeprefix(".") or None
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {first['ctx']['error']}")
    value = first["input"]
    prefix = f"{json.dumps(value)[:80]}: " if isinstance(value, str | int | float) else ""
    reason = prefix + first["msg"].removeprefix("Value error, ")
    reason = {"extra_forbidden": "unknown field; leave it out", "missing": "it is missing"}.get(first["type"], reason)
    name = first.get("ctx", {}).get("param", name)
    return bad_request(reason if name is None else f"{name}: {reason}", name)


def _is_field(part: Any) -> bool:
    """Whether a part of pydantic's error location is a field or an index, not a member of a union."""
    return isinstance(part, int) or (part.isidentifier() and part[:1].islower() and part not in _UNION_MEMBERS)
