"""Fields that constrain the form of an answer: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

Owns their names; what they ask for comes out as one `Constraint`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from unmask.serve.protocol.fields import Body, conflict

Schema = dict[str, Any] | str | bool
_Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)]
ANY_OBJECT = '{"type": "object"}'


class Constraint(NamedTuple):
    """What every answer must be.

    Attributes:
        kind: of the source.
        source: JSON text of a schema, a regular expression, a Lark grammar, or JSON text of a list of texts.
        field: that gave it, to be named in errors.
    """

    kind: Literal["json_schema", "regex", "grammar", "choice"]
    source: str
    field: str


class JsonSchemaSpec(Body):
    """A schema with a name."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The format that the answer must have. The types `regex` and `grammar`, and `schema` of json_object, are not OpenAI's."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchemaSpec | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    pattern: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> ResponseFormat:
        owners = {"json_schema": self.json_schema, "regex": self.pattern, "grammar": self.grammar, "json_object": self.schema_}
        for kind, value in owners.items():
            field = {"regex": "pattern", "json_object": "schema"}.get(kind, kind)
            if (value is not None and self.type != kind) or (value is None and self.type == kind != "json_object"):
                raise ValueError(f"{field} and the type {kind} require each other; give both or neither")
        return self

    def constraint(self) -> Constraint | None:
        """What it asks for; None: any text."""
        match self.type:
            case "json_schema":
                assert self.json_schema is not None
                return Constraint("json_schema", json.dumps(self.json_schema.schema_), "response_format.json_schema.schema")
            case "json_object":
                source = ANY_OBJECT if self.schema_ is None else json.dumps(self.schema_)
                return Constraint("json_schema", source, "response_format.schema")
            case "regex":
                return Constraint("regex", self.pattern or "", "response_format.pattern")
            case "grammar":
                return Constraint("grammar", self.grammar or "", "response_format.grammar")
        return None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of its fields."""

    refused: ClassVar = {"structural_tag": "not supported here; give tools, or a grammar"}

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None


class Structured(Body):
    """Fields that constrain an answer; at most one of them may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _one_constraint(self) -> Structured:
        given = self._constraints()
        if len(given) > 1:
            raise conflict(given[1].field, f"given beside {given[0].field}; an answer follows one of them")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What every answer must be; None: any text."""
        return next(iter(self._constraints()), None)

    def _constraints(self) -> list[Constraint]:
        guided = StructuredOutputs(
            json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice, grammar=self.guided_grammar
        )
        formats = [] if self.response_format is None else [self.response_format.constraint()]
        outputs = [] if self.structured_outputs is None else _outputs(self.structured_outputs, "structured_outputs.")
        return [each for each in (*formats, *outputs, *_outputs(guided, "guided_")) if each is not None]


def _outputs(given: StructuredOutputs, prefix: str) -> list[Constraint]:
    schema = given.json_ if given.json_ is None or isinstance(given.json_, str) else json.dumps(given.json_)
    choice = None if given.choice is None else json.dumps(given.choice)
    constraints = [
        Constraint("json_schema", schema, f"{prefix}json") if schema is not None else None,
        Constraint("json_schema", ANY_OBJECT, f"{prefix}json_object") if given.json_object else None,
        Constraint("regex", given.regex, f"{prefix}regex") if given.regex is not None else None,
        Constraint("choice", choice, f"{prefix}choice") if choice is not None else None,
        Constraint("grammar", given.grammar, f"{prefix}grammar") if given.grammar is not None else None,
    ]
    return [each for each in constraints if each is not None]
