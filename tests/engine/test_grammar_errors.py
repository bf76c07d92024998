"""Structured output: what is refused, what the error names, and what a pathological grammar may cost."""

from __future__ import annotations

import random

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from helpers import refused
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.engine.grammar import MAX_GRAMMAR_CHARACTERS, GrammarCompiler, GrammarState
from unmask.errors import CheckpointError, RequestError


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)


def test_tokenizer_without_bytes_is_refused(tmp_path):
    backend = Backend(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    with refused(RequestError, "tokenizer", "byte-level"):
        GrammarCompiler(load_tokenizer(tmp_path), [0], 2)


def test_ids_must_fit_the_model(tokenizer):
    with refused(CheckpointError, tokenizer.next_free_id, 100):
        GrammarCompiler(tokenizer, [0], 100)
    for ends in ([], [-1], [10**6]):
        with refused(RequestError, "end-of-sequence", ends):
            GrammarCompiler(tokenizer, ends, 1000)


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        (
            {"properties": {"a/b": {"items": {"type": "array", "uniqueItems": True}}}},
            ("#/properties/a~1b/items", "uniqueItems"),
        ),
        (
            {"properties": {"q": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": "text"}}},
            ("#/properties/q", "text"),
        ),
        ({"anyOf": [{"type": "null"}, {"type": "string", "format": "foo"}]}, ("#/anyOf/1", "foo")),
        ({"type": "string", "pattern": "a(?=b)"}, ("#", "look-around")),
        ({"type": "integer", "minimum": 3, "maximum": 2}, ("#", "minimum", 3)),
        ({"$ref": "#/nope"}, ("'/nope'",)),
        ({"x-guidance": {"foo": 1}}, ("foo",)),
        ({"x-guidance": 3}, ("x-guidance", 3)),
        ({"const": {1, 2}}, ("JSON schema", "set")),
        ({"const": float("nan")}, ("JSON schema", "float")),
        ('{"type": ', ("JSON schema", "line 1 column 10")),
        ("[1]", ("JSON schema", "[1]")),
        (False, ("schema", "false")),
        ({"enum": ["x" * MAX_GRAMMAR_CHARACTERS]}, (MAX_GRAMMAR_CHARACTERS,)),
    ],
)
def test_bad_schemas(compiler, schema, names):
    with refused(RequestError, *names):
        compiler.json_schema(schema)


@pytest.mark.parametrize(
    ("kind", "source", "names"),
    [
        ("regex", "ab(", ("regex", "'ab('")),
        ("regex", r"(a)\1", ("regex", "backreferences")),
        ("regex", r"\bfoo", ("regex", "lookarounds")),
        ("regex", "a\\", ("regex", "backslash")),
        ("regex", r"[^\x00-\x{10FFFF}]", ("regex", "nothing")),
        ("regex", "a" * (MAX_GRAMMAR_CHARACTERS + 1), ("regex", MAX_GRAMMAR_CHARACTERS + 1, MAX_GRAMMAR_CHARACTERS)),
        ("lark", 'start: "a" b\nb: c', ("line 2, column 4", '"c"')),
        ("lark", 'rule: "a"', ("Lark grammar", "start")),
        ("lark", "start: start", ("Lark grammar", "nothing")),
        ("lark", 'start: %json {"type": "text"}', ("line 1, column 8", "text")),
        ("lark", 'start: "a\\"" <|im_end|>', ("token", "<|im_end|>")),
        ("lark", "start: /a\\/b/ <[3]>", ("token", "<[3]>")),
        ("lark", 'start[stop="x"]: /.*/', ("option", "stop")),
        ("lark", '{"grammars": [{"lark_grammar": "start: <[3]>"}]}', ("line 1, column 1",)),
        ("lark", "start: " + "(" * 10_000 + '"a"' + ")" * 10_000, ("Lark grammar", "nested")),
    ],
)
def test_bad_regexes_and_grammars(compiler, kind, source, names):
    with refused(RequestError, *names):
        {"regex": compiler.regex, "lark": compiler.lark}[kind](source)


def test_a_rule_over_tokens_that_the_check_did_not_see_still_gives_no_control_token(tokenizer, compiler):
    control = tokenizer.special_tokens["<repo_name>"]

    def start(source: str) -> GrammarState:
        return GrammarState(LLMatcher(compiler.llguidance_tokenizer, source, log_level=0), compiler.vocabulary)

    assert start(f'start: <[{control}]> | "b"').allowed().nonzero()[:, 0].tolist() == tokenizer.encode("b")
    assert not start(f'start: <[{control}]> | "b"').accepts(control)
    with refused(RequestError, "control token"):
        start(f'start: <[{control}]> "b"').forced()


def test_a_dead_end_is_an_error_not_a_wrong_answer(tokenizer, compiler):
    state = compiler.lark('start: "a" x | "b"\nx: x "c"').start()
    state.advance(tokenizer.encode("b")[0])
    assert state.finished
    state = compiler.lark('start: "a" x | "b"\nx: x "c"').start()
    state.advance(tokenizer.encode("a")[0])
    with refused(RequestError, "dead end"):
        state.allowed()


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(.*a){300}"),
        ("regex", "(([ab]{1,1000}c?){1,1000}d?){1,1000}"),
        ("lark", 'start: s\ns: s s s | "a" | '),
        ("lark", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"'),
        ("lark", 'start: a\na: "x" a'),
    ],
)
def test_pathological_grammars_end_in_steps_or_errors(compiler, kind, source):
    drawn, taken, reason = random.Random(0), 0, ""
    try:
        state = {"regex": compiler.regex, "lark": compiler.lark}[kind](source).start()
        for _ in range(50):
            state.advance(drawn.choice(state.allowed().nonzero()[:, 0].tolist()))
            taken += 1
    except RequestError as error:
        reason = str(error)
    assert taken == 50 or "grammar" in reason, (taken, reason)
