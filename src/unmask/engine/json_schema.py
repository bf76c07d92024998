"""JSON schemas as they are compiled: read, checked, and rewritten where llguidance would allow a text that they do not.

Owns what structured output guarantees beyond llguidance: numbers of a schema are exact or refused, keys cannot be spelled in a
second way, and dates exist. A rewritten schema allows a part of the texts that the original allows, never others. Knows no
token and no matcher.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from unmask.errors import RequestError

# As json.dumps and chat templates write JSON, so that everything between the values is forced. A schema can say otherwise.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LITERALS = ("enum", "const", "default", "examples")
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_MAX_EXACT = 2**53
_MAX_BOUND = 9 * 10**18
"""llguidance refuses bounds near 2^63 and beyond."""
_MAX_MULTIPLE_DIGITS = 4
"""Significant digits of `multipleOf`: compiling takes time in proportion to the number; five take seconds."""
_ESCAPED = r'"\\\x00-\x1f\x7f'
_PLAIN_KEY = f"^[^{_ESCAPED}]*$"
_MAX_NAME = 200
_LEAP = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    r"(?:(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|(?:[0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def read_schema(schema: object) -> Mapping[str, Any]:
    """A schema as an object.

    Args:
        schema: as an object, as JSON text, or a boolean.

    Raises:
        RequestError: it is neither an object nor a boolean, or not JSON.
    """
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        json.dumps(parsed, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"JSON schema is not JSON: {str(error)[:200]}; correct it") from error
    if isinstance(parsed, bool):
        parsed = {} if parsed else {"allOf": [False]}
    if not isinstance(parsed, Mapping):
        raise RequestError(f"JSON schema is {repr(parsed)[:80]}; it must be an object, true or false")
    layout = parsed.get("x-guidance", {})
    if not isinstance(layout, Mapping):
        raise RequestError(f"x-guidance of the JSON schema is {repr(layout)[:80]}; it must be an object")
    return {**parsed, "x-guidance": {**ONE_LINE, **layout}}


def close_objects(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema in which an object that lists its properties, and says nothing of others, allows no others.

    Models, small ones above all, invent members where they may. A schema that joins several (`allOf`, or `$ref`, `anyOf` or
    `oneOf` beside properties) stays as it is: closed parts would exclude each other.
    """
    joining = {"$ref", "anyOf", "oneOf"}
    joins = any("allOf" in node or ("properties" in node and node.keys() & joining) for _, node in parts(schema))
    return schema if joins else _closed(schema)


def _closed(node: Any) -> Any:
    if isinstance(node, list | tuple):
        return [_closed(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    closed = dict[str, Any]()
    for key, value in node.items():
        named = key in _NAMED and isinstance(value, Mapping)
        closed[key] = value if key in _LITERALS else {k: _closed(v) for k, v in value.items()} if named else _closed(value)
    names, required = node.get("properties"), node.get("required", [])
    is_list = isinstance(names, Mapping) and isinstance(required, list) and all(name in names for name in required)
    if is_list and not node.keys() & {"additionalProperties", "patternProperties", "minProperties"}:
        closed["additionalProperties"] = False
    return closed


def rewrite_schema(schema: Mapping[str, Any], pointer: str = "#") -> dict[str, Any]:
    """A schema that allows only texts which `schema` allows, whatever llguidance makes of it.

    Args:
        schema: an object; the schemas within it are rewritten too.
        pointer: where it stands, as a JSON pointer.

    Raises:
        RequestError: a number that would not be exact, or another part that cannot be guaranteed.
    """
    rewritten = {}
    for key, value in schema.items():
        place = f"{pointer}/{_token(key)}"
        if key in _LITERALS:
            rewritten[key] = value
        elif isinstance(value, Mapping):
            rewritten[key] = _named_schemas(value, place) if key in _NAMED else rewrite_schema(value, place)
        elif isinstance(value, list | tuple):
            rewritten[key] = [
                rewrite_schema(each, f"{place}/{index}") if isinstance(each, Mapping) else each
                for index, each in enumerate(value)
            ]
        else:
            rewritten[key] = value
    for rule in (_exact_bounds, _small_multiple, _countable_keys, _existing_dates, _single_spelling):
        rule(rewritten, pointer)
    if rewritten.get("uniqueItems") is False:
        del rewritten["uniqueItems"]
    return rewritten


def parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object within a schema, outer before inner, with its JSON pointer."""
    left: list[tuple[str, Any]] = [("#", schema)]
    while left:
        pointer, node = left.pop()
        if isinstance(node, Mapping):
            yield pointer, node
            children = [(_token(key), child) for key, child in node.items()]
        else:
            children = [(str(index), child) for index, child in enumerate(node)] if isinstance(node, list | tuple) else []
        left += [(f"{pointer}/{key}", child) for key, child in reversed(children)]


def _named_schemas(schemas: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    return {
        name: rewrite_schema(each, f"{pointer}/{_token(name)}") if isinstance(each, Mapping) else each
        for name, each in schemas.items()
    }


def _token(key: object) -> str:
    """A key as a JSON pointer spells it."""
    return str(key).replace("~", "~0").replace("/", "~1")


def refusal(pointer: str, reason: str, remedy: str) -> RequestError:
    """The error of the part of a schema at `pointer`."""
    return RequestError(f"JSON schema at {pointer}: {reason}; {remedy}")


def inexact_number(schema: Mapping[str, Any]) -> int | float | None:
    """A number of `enum` or `const` anywhere within a schema that llguidance would change.

    It keeps them as doubles and writes them with 16 digits.
    """
    literals = (node[key] for _, node in parts(schema) for key in ("enum", "const") if key in node)
    return next((number for literal in literals for number in _numbers(literal) if not _is_exact(number)), None)


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers within a JSON value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(each)


def _is_exact(number: float) -> bool:
    """Whether llguidance writes this number: an integer within the doubles' exact range, or at most 15 significant digits."""
    if isinstance(number, int) or number.is_integer():
        return abs(number) <= _MAX_EXACT
    return float(f"{number:.15g}") == number and abs(number) > 1e-15


def _exact_bounds(schema: dict[str, Any], pointer: str) -> None:
    """A bound that is not exact, or too far for llguidance, moves inward, to the next number that is."""
    given = {key: schema[key] for key in (*_LOWER, *_UPPER) if _is_number(schema.get(key))}
    try:
        moved = {key: _inward(bound, math.inf if key in _LOWER else -math.inf) for key, bound in given.items()}
    except OverflowError as error:
        raise refusal(pointer, "a bound is beyond all doubles", "leave it out and check the value afterwards") from error
    lower = max((moved[key] for key in _LOWER if key in moved), default=-math.inf)
    upper = min((moved[key] for key in _UPPER if key in moved), default=math.inf)
    if moved != given and lower > upper:
        what = " and ".join(f"{key} {bound}" for key, bound in given.items())
        raise refusal(pointer, f"between {what} no number is exact in a grammar", "use a wider range, or a string")
    schema.update(moved)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _inward(bound: float, direction: float) -> float:
    """The next exact number towards `direction`: beyond 2^53 a double, else one of 15 significant digits."""
    if abs(bound) > _MAX_BOUND and (bound < 0) == (direction > 0):
        return _MAX_BOUND if bound > 0 else -_MAX_BOUND
    if _is_exact(bound) or bound == 0:
        return bound
    if abs(bound) > _MAX_EXACT:
        rounded = near = float(bound)
        step = math.nextafter(near, direction)
    else:
        rounded = float(f"{bound:.15g}")
        unit = 10.0 ** (math.floor(math.log10(abs(bound))) - 14)
        step = float(f"{rounded + math.copysign(unit, direction):.15g}")
    outward = Fraction(rounded) < bound if direction > 0 else Fraction(rounded) > bound
    inward = step if outward else rounded
    return int(inward) if inward.is_integer() else inward


def _small_multiple(schema: dict[str, Any], pointer: str) -> None:
    multiple = schema.get("multipleOf")
    if _is_number(multiple):
        significant = repr(multiple).partition("e")[0].replace(".", "").strip("-0")
        if len(significant) > _MAX_MULTIPLE_DIGITS:
            reason = f"multipleOf is {multiple}, with more than {_MAX_MULTIPLE_DIGITS} significant digits"
            raise refusal(pointer, reason, "leave it out and check the value afterwards")


def _countable_keys(schema: dict[str, Any], pointer: str) -> None:
    """Keys of additional properties can repeat, and a repeated key counts once."""
    least = schema.get("minProperties", 0)
    if _is_number(least) and least > max(1, len(schema.get("required", []))):
        raise refusal(pointer, f"minProperties is {least}, but keys that no property names can repeat",
                      "name the properties and require them")  # fmt: skip


def _existing_dates(schema: dict[str, Any], pointer: str) -> None:
    """`date`, `time` and `date-time` as patterns: no 29 February in other years, no year 0, no second 60."""
    pattern = _FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
    if pattern is not None:
        del schema["format"]
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": pattern}]


def _single_spelling(schema: dict[str, Any], pointer: str) -> None:
    """Keys of additional properties become a pattern without escapes: `"\\u0061"` would be the property `a` unchecked."""
    names, patterns, others = (
        schema.get("properties") or {},
        schema.get("patternProperties"),
        schema.get("additionalProperties"),
    )
    if not (names or patterns) or others is False or not isinstance(names, Mapping):
        return
    schema["additionalProperties"] = False
    if patterns:
        return
    others = True if others is None else others
    spelled = [name for name in names if re.fullmatch(_PLAIN_KEY, name)]
    if others in (True, {}):
        schema["patternProperties"] = {_PLAIN_KEY: True}
    elif max(map(len, spelled), default=0) <= _MAX_NAME:
        schema["patternProperties"] = {f"^{_other_than(spelled)}$" if spelled else _PLAIN_KEY: others}


def _other_than(names: Sequence[str]) -> str:
    """A regular expression of the keys without escapes that are none of these names, as a tree over their characters."""
    following: dict[str, list[str]] = {}
    for name in names:
        if name:
            following.setdefault(name[0], []).append(name[1:])
    first = "".join(re.escape(char) if char.isascii() else char for char in following)
    branches = [f"[^{first}{_ESCAPED}][^{_ESCAPED}]*"]
    branches += [(re.escape(char) if char.isascii() else char) + _other_than(rest) for char, rest in following.items()]
    if "" not in names:
        branches.append("")
    return f"(?:{'|'.join(branches)})"
