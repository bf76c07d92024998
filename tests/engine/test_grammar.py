"""Structured output: soundness by random walks, completeness on texts written by others, control tokens.

The bytes of tokens, the JSON check and the regular expressions here are independent of llguidance.
"""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from helpers import SPECIAL_TOKENS, make_tokenizer, refused
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.engine.grammar import Grammar, GrammarCompiler, GrammarState
from unmask.errors import RequestError
from unmask.models.weights.hub import resolve

SPARE_ROWS = 13

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "The quick", "é<|im_end|>"]}, "maxItems": 3},
        "score": {"type": ["number", "null"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "boolean"}, "left": {"$ref": "#"}, "right": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value"],
    "additionalProperties": False,
}
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "get_weather"},
        "arguments": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
SCHEMAS = (PERSON, TREE, CALL, {"type": "object"})
PATTERNS = (r"[0-9]{3}-[0-9]{4}", r"(cat|category|dog)s?", r"a*b|<\|im_end\|>+", r"([a-z]{1,8} ){0,3}é.", r"\[M\]( \[M\]){2}|")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return make_tokenizer(folder, special_tokens=(*SPECIAL_TOKENS, "<|mask|>"), mask_token="<|mask|>", plain_added=("<think>",))


def compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    """Two eos ids, and more rows than tokens."""
    specials = tokenizer.special_tokens
    ends = [specials[name] for name in ("<|endoftext|>", "<|im_end|>")]
    return GrammarCompiler(tokenizer, ends, tokenizer.vocab_size + SPARE_ROWS)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return compiler_of(tokenizer)


@cache
def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Bytes of every text token, by GPT-2's table of printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    vocabulary = json.loads(tokenizer.serialised)["model"]["vocab"]
    known = {id_: bytes(table[char] for char in token) for token, id_ in vocabulary.items() if token not in SPECIAL_TOKENS}
    return known | {id_: text.encode() for id_, text in tokenizer.added_tokens.items()}


def conforms(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a JSON value satisfies a schema; only the keywords used here."""
    schema = root if schema.get("$ref") == "#" else schema
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    if "anyOf" in schema:
        return any(conforms(value, option, root) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    named = schema.get("type", list(kinds))
    named = [named] if isinstance(named, str) else named
    if not any(isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in named):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return (
            set(schema.get("required", [])) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(known))
            and all(conforms(child, known.get(key, {}), root) for key, child in value.items())
        )
    if isinstance(value, list):
        return len(value) <= schema.get("maxItems", 99) and all(conforms(child, schema["items"], root) for child in value)
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", len(value))
    return value is None or schema.get("minimum", value) <= value <= schema.get("maximum", value)


def text_of(ids: list[int], spelling: dict[int, bytes]) -> str | None:
    """The text, or None within a character."""
    try:
        return b"".join(spelling[id_] for id_ in ids).decode()
    except UnicodeDecodeError:
        return None


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, length: int, is_sentence: Any) -> list[int]:
    """Random allowed tokens, after `length` of them the ones that close what is open; everything checked on the way."""
    drawn, state, ids = random.Random(seed), grammar.start(), []
    spelling = token_bytes(tokenizer)
    specials = tokenizer.special_tokens
    ends = {specials["<|endoftext|>"], specials["<|im_end|>"]}
    never = (set(specials.values()) - ends) | set(range(tokenizer.vocab_size, tokenizer.vocab_size + SPARE_ROWS))
    closers = tokenizer.encode('"') + tokenizer.encode("}") + tokenizer.encode("]") + tokenizer.encode("0")
    while len(ids) < 600:
        allowed, forced = set(state.allowed().nonzero()[:, 0].tolist()), state.forced()
        text = text_of(ids, spelling)
        assert state.may_end == (text is not None and is_sentence(text))
        assert allowed & ends == (ends if state.may_end else set())
        assert not allowed & never
        assert state.finished == (allowed == ends)
        assert not forced or allowed == {forced[0]}
        if allowed & ends and (len(ids) >= length or state.finished or drawn.random() < 0.1):
            return ids
        closing = [id_ for id_ in closers if id_ in allowed]
        choices = sorted(allowed - ends)
        ids.append(closing[0] if len(ids) >= length and closing else drawn.choice(choices))
        assert state.accepts(ids[-1])
        state.advance(ids[-1])
        if forced:
            assert state.forced()[: len(forced) - 1] == forced[1:]
    raise AssertionError("the walk does not end")


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schema", SCHEMAS, ids=["person", "tree", "call", "any"])
@given(seed=st.integers(0, 2**32), length=st.integers(0, 60))
def test_any_allowed_tokens_give_json_that_the_schema_accepts(tokenizer, compiler, schema, seed, length):
    ids = walk(compiler.json_schema(schema), tokenizer, seed, length, is_json)
    value = json.loads(text_of(ids, token_bytes(tokenizer)) or "")
    assert conforms(value, schema, schema), value


@pytest.mark.parametrize("pattern", PATTERNS)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 30))
def test_any_allowed_tokens_give_a_match_of_the_regex(tokenizer, compiler, pattern, seed, length):
    matches = re.compile(pattern).fullmatch
    ids = walk(compiler.regex(pattern), tokenizer, seed, length, lambda text: matches(text) is not None)
    assert matches(text_of(ids, token_bytes(tokenizer)) or "")


def test_lark_with_a_json_schema_within(tokenizer, compiler):
    grammar = compiler.lark(
        'start: "Answer: " value ("," value)*\nvalue: NUMBER | %json {"const": "a b"}\nNUMBER: /[0-9]{1,3}/'
    )
    for seed in range(20):
        sentence = re.compile(r'Answer: ([0-9]{1,3}|"a b")(,([0-9]{1,3}|"a b"))*').fullmatch
        ids = walk(grammar, tokenizer, seed, 5, lambda text, sentence=sentence: sentence(text) is not None)
        assert tokenizer.decode(ids).startswith("Answer: ")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b c", "<think>"]), inner, max_size=3),
    max_leaves=6,
)


@given(value=st.dictionaries(st.sampled_from(["name", "x", "<|im_end|>"]), VALUES, max_size=3))
def test_what_json_dumps_writes_is_accepted_token_by_token(tokenizer, compiler, value):
    state = compiler.json_object().start()
    ids = tokenizer.encode(json.dumps(value, ensure_ascii=False))
    for id_ in ids:
        assert state.allowed()[id_]
        assert state.accepts(id_)
        assert not state.may_end
        state.advance(id_)
    assert state.finished


def check_members(state: GrammarState, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    allowed = state.allowed().tolist()
    assert len(allowed) == tokenizer.vocab_size + SPARE_ROWS
    assert [state.accepts(id_) for id_ in range(len(allowed))] == allowed
    assert not state.accepts(-1)
    assert not state.accepts(len(allowed))


def test_accepts_is_membership_in_allowed(tokenizer, compiler):
    for grammar in (
        compiler.json_schema(PERSON),
        compiler.regex(PATTERNS[3]),
        compiler.lark("start: /The quick/ (/ brown/ | /x+/)"),
    ):
        for seed in range(3):
            state, drawn = grammar.start(), random.Random(seed)
            while not state.finished:
                check_members(state, compiler, tokenizer)
                state.advance(drawn.choice(state.allowed().nonzero()[:, 0].tolist()))
            check_members(state, compiler, tokenizer)


def test_forced_tokens_are_those_the_tokenizer_writes(tokenizer, compiler):
    schema = {"type": "object", "properties": {"answer": {"const": "The quick <|im_end|> fox"}, "n": {"type": "integer"}}}
    schema["required"] = ["answer", "n"]
    ids = tokenizer.encode('{"answer": "The quick <|im_end|> fox", "n": 12}')
    state = compiler.json_schema(schema).start()
    forced = state.forced()
    assert len(forced) > 10
    assert forced == ids[: len(forced)]
    assert not set(forced) & set(tokenizer.special_tokens.values())
    for id_ in forced:
        state.advance(id_)
    assert not state.forced(), "digits are a choice"


def test_a_literal_control_token_in_a_string_is_ordinary_text(tokenizer, compiler):
    for spelled in (*tokenizer.special_tokens, "<think>"):
        grammar = compiler.regex(re.escape(spelled) + "(x)?")
        ids = walk(grammar, tokenizer, 0, 0, lambda text, spelled=spelled: text in (spelled, spelled + "x"))
        assert tokenizer.decode(ids, skip_special=True) == spelled


def test_end_of_sequence_only_at_the_end_and_nothing_after_it(tokenizer, compiler):
    state = compiler.regex("(12)?").start()
    ends = sorted(tokenizer.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>"))
    assert state.may_end
    assert not state.finished
    state.advance(tokenizer.encode("1")[0])
    assert not state.may_end
    with refused(RequestError, "token", ends[1], "grammar"):
        state.advance(ends[1])
    state.advance(tokenizer.encode("2")[0])
    assert state.finished
    state.advance(ends[1])
    state.advance(ends[0])
    assert state.finished
    assert state.allowed().nonzero()[:, 0].tolist() == ends
    assert not state.accepts(tokenizer.encode("1")[0])


def test_a_refused_token_changes_nothing(tokenizer, compiler):
    state = compiler.json_schema(PERSON).start()
    before = state.allowed().clone()
    with pytest.raises(RequestError):
        state.advance(tokenizer.encode("x")[0])
    assert state.allowed().equal(before)
    assert state.forced()


def test_a_copy_is_independent(tokenizer, compiler):
    one = compiler.regex("(cat|dog)s").start()
    one.allowed()
    other = one.copy()
    for id_ in tokenizer.encode("cat"):
        one.advance(id_)
    for id_ in tokenizer.encode("d"):
        other.advance(id_)
    assert tokenizer.decode(one.forced()) == "s"
    assert tokenizer.decode(other.forced()).startswith("og")
    ended = compiler.regex("(12)?").start()
    ended.advance(tokenizer.special_tokens["<|im_end|>"])
    assert ended.copy().finished
    assert not ended.copy().accepts(tokenizer.encode("1")[0])


def test_states_of_one_grammar_in_several_threads(tokenizer, compiler):
    grammar = compiler.json_schema(PERSON)

    def run(seed: int) -> list[int]:
        return walk(grammar, tokenizer, seed, 30, is_json)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(24))) == [run(seed) for seed in range(24)]


def test_layout_is_one_line_unless_the_schema_says_otherwise(tokenizer, compiler):
    def takes(schema: dict[str, Any], text: str) -> bool:
        state = compiler.json_schema(schema).start()
        for id_ in tokenizer.encode(text):
            if not state.accepts(id_):
                return False
            state.advance(id_)
        return state.may_end

    schema = {"type": "object", "additionalProperties": {"type": "integer"}}
    free = schema | {"x-guidance": {"whitespace_flexible": True, "item_separator": ",", "key_separator": ":"}}
    assert takes(schema, '{"a": 1, "b": 2}')
    assert not takes(schema, '{"a":1}')
    assert takes(free, '{\n  "a":1,\n  "b": 2\n}')


def test_tokenizer_that_normalises_cannot_contradict_the_grammar(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    composing = load_tokenizer(tmp_path)
    assert composing.encode("e\u0301") == composing.encode("é")
    ids = walk(compiler_of(composing).json_schema({"const": "e\u0301"}), composing, 0, 0, is_json)
    assert text_of(ids, token_bytes(composing)) == '"e\u0301"'


def sentencepiece_like(folder: Path) -> Tokenizer:
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *'ab{}":', "ab", "▁ab"]
    model = models.BPE({token: id_ for id_, token in enumerate(tokens)}, [("a", "b"), ("▁", "ab")], byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return load_tokenizer(folder)


def test_byte_fallback_tokenizer(tmp_path):
    tokenizer = sentencepiece_like(tmp_path)
    state = GrammarCompiler(tokenizer, [tokenizer.eos_id], tokenizer.vocab_size).json_schema({"const": "ab é"}).start()
    assert state.forced() == tokenizer.encode('"ab é"')
    for id_ in state.forced():
        state.advance(id_)
    assert state.allowed().nonzero()[:, 0].tolist() == [tokenizer.eos_id]


def test_strings_and_comments_of_a_lark_grammar_may_look_like_tokens(tokenizer, compiler):
    state = compiler.lark('start: "<|im_end|>" /<a>/ "//" // <b>\n# stop=<c>').start()
    assert tokenizer.decode(state.forced()) == "<|im_end|><a>//"
    assert not set(state.forced()) & set(tokenizer.special_tokens.values())


@pytest.mark.slow
def test_the_embedded_models_tokenizer(tmp_path):
    tokenizer = load_tokenizer(resolve("smollm2-135m", cache=tmp_path))
    compiler = compiler_of(tokenizer)
    for seed, schema in enumerate(SCHEMAS * 5):
        ids = walk(compiler.json_schema(schema), tokenizer, seed, 40, is_json)
        assert conforms(json.loads(text_of(ids, token_bytes(tokenizer)) or ""), schema, schema)
    text = '{"name": "get_weather", "arguments": {"city": "São Paulo <|im_end|>"}}'
    state, free = compiler.json_schema(CALL).start(), 0
    for id_ in tokenizer.encode(text):
        free += not state.forced()
        state.advance(id_)
    assert state.finished
    assert free <= len(tokenizer.encode('"São Paulo <|im_end|>"}}')), "everything up to the string is forced"
