"""What structured output guarantees about JSON: no allowed text is outside its schema, judged by an independent validator."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from unmask.data.tokenizer import Tokenizer
from unmask.engine.grammar import GrammarCompiler
from unmask.engine.json_schema import rewrite_schema
from unmask.errors import RequestError

BIG = 2**60 + 1
DATE = {"type": "string", "format": "date"}
LISTED = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NUMBERS = {**LISTED, "additionalProperties": True}
OTHERS = {**LISTED, "additionalProperties": {"type": "boolean"}}


IDS = {
    "type": "object",
    "properties": {
        "who": {"anyOf": [{"type": "integer", "enum": [BIG, BIG + 2]}, {"type": "integer", "maximum": 9}]},
        "when": DATE,
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        "more": {"$ref": "#"},
    },
    "required": ["when"],
    "$defs": {"tag": {"const": BIG}, "x": {"type": "null"}},
}


def ids(**members: Any) -> str:
    """A text of the schema `IDS`."""
    order = {name: members.get(name, "2024-02-29") for name in ("who", "when", "tags") if name in members or name == "when"}
    return json.dumps(order)[:-1] + (f', "more": {members["more"]}' if "more" in members else "") + "}"


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)


def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    """Whether the grammar of a schema lets the text be written, character by character, and end."""
    state = compiler.json_schema(schema).start()
    for token in [id_ for char in text for id_ in tokenizer.encode(char)]:
        if state.forced():
            state._forced = None  # any spelling will do here, not only the canonical tokens
        if state._matcher.try_consume_tokens([token]) != 1:
            return False
        state._allowed_V = state._forced = None
    return state.may_end


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "maximum": 2**63 - 1}, ["5", "-5", "9007199254740993"], ["9223372036854775808"]),
        ({"type": "integer", "minimum": -(2**63)}, ["-9007199254740993", "7"], []),
        ({"type": "integer", "minimum": BIG, "maximum": BIG + 600}, ["1152921504606847232"], [str(BIG - 1), str(BIG + 601)]),
        ({"type": "number", "maximum": 123456789.123456789}, ["12.5", "-1"], ["123456789.1234568"]),
        (DATE, ["2024-02-29", "2000-02-29", "0001-12-31"], ["2023-02-29", "1900-02-29", "0000-01-01", "2024-13-01"]),
        ({"format": "time"}, ["23:59:59Z", "00:00:00.5+01:00", "3"], ["23:59:60Z", "24:00:00Z"]),
        ({"type": "string", "format": "date-time"}, ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z"]),
        (NUMBERS, ['{"a": 1, "b": "x"}', '{"a": 1}'], ['{"a": 1, "\\u0061": "x"}', '{"a": 1, "a": "x"}']),
        (OTHERS, ['{"a": 1, "b": true, "ab": false, "": true}'], ['{"a": 1, "\\u0061": true}', '{"a": 1, "a": true}']),
        (
            {"type": "object", "patternProperties": {"^x": {"type": "integer"}}},
            ['{"xy": 1}', "{}"],
            ['{"\\u0078": "q"}', '{"xy": "q"}'],
        ),
        (LISTED, ['{"a": 1}'], ['{"a": 1, "b": 1}']),
        ({"properties": {"properties": LISTED}}, ['{"properties": {"a": 1}}', "{}"], ['{"properties": {"a": 1, "b": 1}}']),
        ({"allOf": [LISTED, {"properties": {"b": {"const": 2}}}]}, ['{"a": 1, "b": 2}'], ['{"a": 1, "b": 1}', '{"b": 2}']),
        (
            {"properties": {"é": {"const": 1}}, "additionalProperties": {}},
            ['{"é": 1}', '{"e": 2}'],
            ['{"\\u00e9": 2}', '{"é": 2}'],
        ),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": False}, ["[null, null]"], []),
        ({"type": "integer", "multipleOf": 1000000}, ["3000000"], ["300000"]),
        ({"const": 123456789.5}, ["123456789.5"], ["123456789.6"]),
        ({"type": "number", "maximum": 10**400}, ["5", "-2.5"], []),
        ({"const": 10**400}, [str(10**400)], [str(10**400 + 1)]),
        ({"enum": [1, BIG, "a"]}, ["1", str(BIG), '"a"'], [str(BIG - 1), str(int(float(BIG)))]),
        ({"const": {"deep": [BIG, "é"]}}, [f'{{"deep": [{BIG}, "é"]}}'], [f'{{"deep": [{BIG - 1}, "é"]}}']),
        ({"const": 123456789.123456789}, ["123456789.12345679"], ["123456789.1234568"]),
        (
            IDS,
            [ids(), ids(who=BIG + 2), ids(who=3, tags=[BIG, BIG]), ids(tags=[], more=ids())],
            [ids(who=BIG + 1), ids(tags=[1])],
        ),
    ],
    ids=str,
)
def test_texts(compiler, tokenizer, schema, good, bad):
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    quotes = schema.get("format") is not None
    for text in [json.dumps(each) if quotes and each != "3" else each for each in good]:
        assert accepts(compiler, tokenizer, schema, text), text
        assert validator.is_valid(json.loads(text)), text
    for text in [json.dumps(each) if quotes else each for each in bad]:
        assert not accepts(compiler, tokenizer, schema, text), text


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"enum": [BIG], "minimum": 1}, ("#", BIG)),
        ({"properties": {"id": {"not": {"const": BIG}}}, "type": "object"}, ("#/properties/id", BIG)),
        ({"enum": [BIG], "type": "string"}, ("string",)),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {"const": BIG}}, "required": ["c"], "type": "object"}, ("'c'",)),
        ({"type": "integer", "minimum": BIG, "maximum": BIG}, ("#", "minimum", BIG)),
        ({"type": "integer", "multipleOf": 2**31}, ("multipleOf", 2**31)),
        ({"type": "number", "minimum": 10**400}, ("#", "bound")),
        ({"type": "number", "multipleOf": 10**400}, ("out of range",)),
        ({"type": "object", "minProperties": 2}, ("minProperties", 2)),
    ],
    ids=str,
)
def test_what_cannot_be_guaranteed_is_refused(compiler, schema, names):
    with refused(RequestError, *names):
        compiler.json_schema(schema)
    with refused(RequestError, *names):
        compiler.lark(f"start: %json {json.dumps(schema)}")


def test_a_string_that_looks_like_an_embedded_schema_is_none(compiler):
    compiler.lark(f'start: "%json {{\\"const\\": {BIG}}}" // %json {{"const": {BIG}}}\n')


@pytest.mark.parametrize("schema", [NUMBERS, OTHERS, DATE, {"type": "object", "properties": {"aa": DATE, "ab": {"const": 1}}}])
def test_random_texts_satisfy_the_schema(compiler, schema):
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    rng, ended = random.Random(0), 0
    for _ in range(12):
        state, spelling = compiler.json_schema(schema).start(), b""
        for _ in range(60):
            allowed = state.allowed().nonzero().flatten().tolist()
            ends = [token for token in allowed if not compiler.token_bytes[token]]
            token = rng.choice(ends) if ends and rng.random() < 0.3 else rng.choice(allowed)
            state.advance(token)
            if token in ends:
                ended += 1
                assert validator.is_valid(json.loads(spelling)), spelling
                break
            spelling += compiler.token_bytes[token]
    assert ended


KEYS = st.text(st.sampled_from('ab^]\\"-.é'), max_size=4)


@given(st.lists(KEYS, min_size=1, unique=True), KEYS)
def test_keys_of_additional_properties_are_the_other_ones(names, key):
    schema = {"properties": {name: {} for name in names}, "additionalProperties": {"type": "null"}}
    (pattern,) = rewrite_schema(schema)["patternProperties"]
    needs_escape = '"' in key or "\\" in key
    assert bool(re.fullmatch(pattern.strip("^$"), key)) == (key not in names and not needs_escape)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70))
def test_bounds_move_inward_only(bound):
    assert rewrite_schema({"minimum": bound})["minimum"] >= bound or bound > 0
    assert rewrite_schema({"maximum": bound})["maximum"] <= bound or bound < 0
    assert rewrite_schema({"minimum": abs(bound)})["minimum"] >= abs(bound)
    assert rewrite_schema({"maximum": -abs(bound)})["maximum"] <= -abs(bound)
