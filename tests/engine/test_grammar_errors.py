"""Structured output: what is refused, in which words, and what a pathological grammar may cost."""

from __future__ import annotations

import random

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from helpers import make_tokenizer
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.engine.grammar import MAX_GRAMMAR_CHARACTERS, GrammarCompiler, GrammarState
from unmask.errors import CheckpointError, RequestError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)


def test_tokenizer_without_bytes_is_refused(tmp_path):
    backend = Backend(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="structured output needs a byte-level or byte-fallback tokenizer"):
        GrammarCompiler(load_tokenizer(tmp_path), [0], 2)


def test_ids_must_fit_the_model(tokenizer):
    with pytest.raises(CheckpointError, match=f"the tokenizer has {tokenizer.next_free_id} tokens, the model 100 rows"):
        GrammarCompiler(tokenizer, [0], 100)
    for ends in ([], [-1], [10**6]):
        with pytest.raises(RequestError, match=r"end-of-sequence ids are \["):
            GrammarCompiler(tokenizer, ends, 1000)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"properties": {"a/b": {"items": {"type": "array", "uniqueItems": True}}}},
            r"at #/properties/a~1b/items: Unimplemented keys",
        ),
        (
            {"properties": {"q": {"$ref": "#/$defs/d"}}, "$defs": {"d": {"type": "text"}}},
            "at #/properties/q: Invalid type: text",
        ),
        ({"anyOf": [{"type": "null"}, {"type": "string", "format": "foo"}]}, "at #/anyOf/1: Unknown format: foo"),
        ({"type": "string", "pattern": "a(?=b)"}, "at #: look-around"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, r"at #: Unsatisfiable schema: minimum \(3\)"),
        ({"$ref": "#/nope"}, "Pointer '/nope' does not exist"),
        ({"x-guidance": {"foo": 1}}, "unknown field `foo`"),
        ({"x-guidance": 3}, "x-guidance of the JSON schema is 3; it must be an object"),
        ({"const": {1, 2}}, "not JSON: Object of type set"),
        ({"const": float("nan")}, "not JSON: Out of range float"),
        ('{"type": ', "not JSON: Expecting value: line 1 column 10"),
        ("[1]", r"is \[1\]; it must be an object, true or false"),
        (False, "schema is false"),
        ({"enum": ["x" * MAX_GRAMMAR_CHARACTERS]}, "at most 1000000 are compiled"),
    ],
)
def test_bad_schemas(compiler, schema, message):
    with pytest.raises(RequestError, match=message) as caught:
        compiler.json_schema(schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "ab(", r"^regex 'ab\(': unclosed group; use only"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"\bfoo", "lookarounds not supported"),
        ("regex", "a\\", "ends in a lone backslash; double it"),
        ("regex", r"[^\x00-\x{10FFFF}]", "nothing matches it"),
        ("regex", "a" * (MAX_GRAMMAR_CHARACTERS + 1), "has 1000001 characters"),
        ("lark", 'start: "a" b\nb: c', 'line 2, column 4: unknown name: "c"'),
        ("lark", 'rule: "a"', "no start rule found"),
        ("lark", "start: start", "nothing matches it"),
        ("lark", 'start: %json {"type": "text"}', "line 1, column 8: failed to compile JSON schema: Invalid type: text"),
        ("lark", 'start: "a\\"" <|im_end|>', r"token <\|im_end\|> is not supported"),
        ("lark", "start: /a\\/b/ <[3]>", r"token <\[3\]> is not supported"),
        ("lark", 'start[stop="x"]: /.*/', "option stop is not supported"),
        ("lark", '{"grammars": [{"lark_grammar": "start: <[3]>"}]}', "line 1, column 1"),
        ("lark", "start: " + "(" * 10_000 + '"a"' + ")" * 10_000, "too deeply nested"),
    ],
)
def test_bad_regexes_and_grammars(compiler, kind, source, message):
    with pytest.raises(RequestError, match=message) as caught:
        {"regex": compiler.regex, "lark": compiler.lark}[kind](source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_rule_over_tokens_that_the_check_did_not_see_still_gives_no_control_token(tokenizer, compiler):
    control = tokenizer.special_tokens["<repo_name>"]

    def start(source: str) -> GrammarState:
        return GrammarState(LLMatcher(compiler._inner, source, log_level=0), compiler._vocabulary)

    assert start(f'start: <[{control}]> | "b"').allowed().nonzero()[:, 0].tolist() == tokenizer.encode("b")
    assert not start(f'start: <[{control}]> | "b"').accepts(control)
    with pytest.raises(RequestError, match="asks for a control token"):
        start(f'start: <[{control}]> "b"').forced()


def test_a_dead_end_is_an_error_not_a_wrong_answer(tokenizer, compiler):
    state = compiler.lark('start: "a" x | "b"\nx: x "c"').start()
    state.advance(tokenizer.encode("b")[0])
    assert state.finished
    state = compiler.lark('start: "a" x | "b"\nx: x "c"').start()
    state.advance(tokenizer.encode("a")[0])
    with pytest.raises(RequestError, match="led into a dead end"):
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
