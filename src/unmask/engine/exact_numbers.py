"""JSON schemas with numbers that llguidance would change, such as 64-bit ids in `enum`, as rules of a Lark grammar.

Owns the rules around such numbers: objects, arrays, alternatives and references. Whatever holds no such number stays
llguidance's, in `%json`. These texts are on one line, and an object around such a number has no additional properties.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from unmask.engine.json_schema import ONE_LINE, inexact_number, parts, refusal, rewrite_schema

_DEFINITIONS = ("$defs", "definitions")
_NOTES = {"title", "description", "$comment", "default", "examples", "$schema", "$id", "x-guidance", *_DEFINITIONS}
_SHAPES: tuple[tuple[str, set[str]], ...] = (
    ("literal", {"enum", "type"}),
    ("literal", {"const", "type"}),
    ("alternatives", {"anyOf"}),
    ("reference", {"$ref"}),
    ("object", {"type", "properties", "required", "additionalProperties"}),
    ("array", {"type", "items", "minItems", "maxItems"}),
)


def write_exactly(grammar: str, is_quoted: Callable[[int], bool]) -> str:
    """A Lark grammar in which every `%json {...}` allows only texts that its schema accepts.

    Args:
        grammar: its text.
        is_quoted: whether a position is within a string or a comment.

    Raises:
        RequestError: a schema that cannot be guaranteed.
    """
    pieces, rules, end = list[str](), list[str](), 0
    for match in re.finditer(r"%json\s*(?=\{)", grammar):
        if match.start() < end or is_quoted(match.start()):
            continue
        try:
            schema, stop = json.JSONDecoder().raw_decode(grammar, match.end())
        except ValueError:
            continue  # llguidance says what is wrong with it.
        writer = _Writer(schema, f"json_{len(pieces)}")
        pieces += [grammar[end : match.start()], writer.value(schema, "#")]
        rules += writer.rules
        end = stop
    return "\n".join(["".join([*pieces, grammar[end:]]), *rules])


class _Writer:
    """The rules of one schema, by JSON pointer."""

    def __init__(self, root: Mapping[str, Any], prefix: str) -> None:
        self.rules: list[str] = []
        self._root, self._prefix = root, prefix
        self._names: dict[str, str] = {}

    @cached_property
    def _shared(self) -> dict[str, Any]:
        """The definitions that llguidance may see: those without such a number."""
        return {
            key: {name: each for name, each in self._root[key].items() if self._inexact(each) is None}
            for key in _DEFINITIONS
            if isinstance(self._root.get(key), Mapping)
        }

    def value(self, schema: Any, pointer: str) -> str:
        """What stands in a rule for a value of this schema."""
        inexact = self._inexact(schema)
        if inexact is None:
            return self._json(schema, pointer)
        if pointer not in self._names:
            name = self._names[pointer] = f"{self._prefix}_{len(self._names)}"
            keys = schema.keys() - _NOTES
            shape = next((shape for shape, allowed in _SHAPES if keys and keys <= allowed), None)
            if shape is None or (shape == "reference" and not schema["$ref"].startswith("#")):
                raise refusal(pointer, f"{inexact} within it would be changed to a number near it",
                              "write it as a string, or put only properties, items, anyOf and $ref around it")  # fmt: skip
            self.rules.append(f"{name}: {_BODIES[shape](self, schema, pointer)}")
        return self._names[pointer]

    def _json(self, schema: Any, pointer: str) -> str:
        if pointer == "#":
            return f"%json {json.dumps(rewrite_schema(schema))}"
        if not isinstance(schema, Mapping):
            schema = {} if schema else {"allOf": [False]}
        outside = [ref for ref in _references(schema) if not ref.startswith(tuple(f"#/{key}/" for key in _DEFINITIONS))]
        if outside:
            raise refusal(pointer, f"$ref is {outside[0]!r} beside a number that would be changed", "use $defs")
        return f"%json {json.dumps(rewrite_schema({**schema, **self._shared, 'x-guidance': ONE_LINE}, pointer))}"

    def _inexact(self, schema: Any) -> int | float | None:
        """A number within a schema, references followed, that llguidance would change."""
        left, seen = [schema], set[str]()
        while left:
            node = left.pop()
            number = inexact_number(node) if isinstance(node, Mapping) else None
            if number is not None:
                return number
            for ref in _references(node) if isinstance(node, Mapping) else ():
                if ref not in seen and ref.startswith("#"):
                    seen.add(ref)
                    left.append(self._resolve(ref))
        return None

    def _resolve(self, ref: str) -> Any:
        node: Any = self._root
        for step in ref.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            node = node[int(key)] if isinstance(node, list) and key.isdigit() and int(key) < len(node) else _get(node, key)
        return node

    def _literal(self, schema: Mapping[str, Any], pointer: str) -> str:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if "type" in schema and any(not _has_type(value, schema["type"]) for value in values):
            raise refusal(pointer, f"a value of enum or const is no {schema['type']}", "leave the type or the value out")
        return " | ".join(_quoted(json.dumps(value, ensure_ascii=False)) for value in values)

    def _alternatives(self, schema: Mapping[str, Any], pointer: str) -> str:
        return " | ".join(self.value(each, f"{pointer}/anyOf/{index}") for index, each in enumerate(schema["anyOf"]))

    def _reference(self, schema: Mapping[str, Any], pointer: str) -> str:
        return self.value(self._resolve(schema["$ref"]), schema["$ref"])

    def _object(self, schema: Mapping[str, Any], pointer: str) -> str:
        """Members in the order of the schema; `following` is what may come after a member that has been written."""
        properties, required = schema.get("properties", {}), schema.get("required", [])
        missing = [name for name in required if name not in properties]
        if schema.get("type") != "object" or missing:
            reason = f"required {missing[0]!r} is no property" if missing else "type is not object"
            raise refusal(pointer, f"{reason}, around a number that would be changed", "describe the object by its properties")
        members = [
            (f"{_quoted(json.dumps(name, ensure_ascii=False) + ': ')} {self.value(each, f'{pointer}/properties/{name}')}",
             name in required)
            for name, each in properties.items()
        ]  # fmt: skip
        following, whole = "", ""
        for member, needed in reversed(members):
            whole = f"{member}{following}" if needed else f"({member}{following} | {whole or _EMPTY})"
            following = f' ", " {member}{following}' if needed else f' (", " {member})?{following}'
        return f'"{{" {whole} "}}"'

    def _array(self, schema: Mapping[str, Any], pointer: str) -> str:
        if schema.get("type") != "array":
            raise refusal(pointer, "type is not array, around a number that would be changed", "give the type")
        item, least, most = self.value(schema["items"], f"{pointer}/items"), schema.get("minItems", 0), schema.get("maxItems")
        more = f'(", " {item}){{{max(least - 1, 0)},{"" if most is None else max(most - 1, 0)}}}'
        items = f"{item} {more}"
        return f'"[" {items if least else f"({items})?" if most != 0 else ""} "]"'


_EMPTY = '""'
_BODIES: Mapping[str, Callable[[_Writer, Mapping[str, Any], str], str]] = {
    "literal": _Writer._literal,
    "alternatives": _Writer._alternatives,
    "reference": _Writer._reference,
    "object": _Writer._object,
    "array": _Writer._array,
}
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list, "object": dict,
}  # fmt: skip


def _has_type(value: Any, names: str | list[str]) -> bool:
    """Whether a JSON value has this type, or one of these."""
    wanted = [names] if isinstance(names, str) else names
    return any(isinstance(value, _TYPES[name]) and (name == "boolean") == isinstance(value, bool) for name in wanted)


def _references(schema: Mapping[str, Any]) -> Iterator[str]:
    """Every `$ref` within a schema."""
    return (node["$ref"] for _, node in parts(schema) if isinstance(node.get("$ref"), str))


def _get(node: Any, key: str) -> Any:
    return node.get(key) if isinstance(node, Mapping) else None


def _quoted(text: str) -> str:
    return json.dumps(text)
