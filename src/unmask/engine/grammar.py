"""Structured output: which tokens may come next so that the text stays the beginning of a sentence of a grammar.

Owns the compilation of JSON schemas, regular expressions and Lark grammars through `llguidance`, and one request's place in
such a grammar. Knows token ids and their bytes: no model, no block, no sampling. A grammar speaks of text only, so control
tokens (end-of-sequence apart, where the text may end) are never allowed, and text that spells one is made of ordinary tokens.

Legend: V rows of the model's vocabulary, which may be more than the tokenizer has tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from unmask.data.tokenizer import Tokenizer
from unmask.engine.exact_numbers import write_exactly
from unmask.engine.json_schema import close_objects, inexact_number, parts, read_schema, rewrite_schema
from unmask.errors import RequestError

MAX_GRAMMAR_CHARACTERS = 1_000_000
_MAX_LOCATED_CHARACTERS = 4_000_000
_DEAD_END = "the grammar has led into a dead end: no token can follow; give every rule a way to be completed"
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"i?|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\\n])+/[imslux]*')
_TOKEN_RULE = re.compile(r"<[^<>\n]*>")
_TOKEN_OPTION = re.compile(r"\b(stop|max_tokens|temperature)\s*=")
_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")


def _limits() -> LLParserLimits:
    """What compiling and one step may cost at most; the speeds are those of the library's documentation."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,  # to build the lexer: some 20 ms
        step_lexer_fuel=200_000,  # of one step: some 14 ms
        step_max_items=50_000,  # of the parser in one step: some 3 ms
        max_items_in_row=2_000,
        max_lexer_states=50_000,  # of 1-2 kB each
        max_grammar_size=500_000,
        verbose_errors=False,
    )


@dataclass(frozen=True)
class _Spelling:
    """The tokenizer as `llguidance.TokenizerWrapper` wants it: bytes of every token, none for one that is no text.

    Control tokens have no bytes, so no rule over text can ask for one.
    """

    tokenizer: Tokenizer
    plain: LLTokenizer
    tokens: tuple[bytes, ...]
    eos_token_id: int
    bos_token_id: None = None
    special_token_ids: tuple[int, ...] = ()

    def __call__(self, text: bytes) -> list[int]:
        """Canonical tokens within a text; where the tokenizer normalises text away (NFC), the longest match each time."""
        ids = self.tokenizer.encode(text.decode(), after=[None])
        exact = b"".join(self.tokens[id_] for id_ in ids) == text
        return ids if exact else self.plain.greedy_tokenize(text.decode())


class GrammarCompiler:
    """Compiles grammars for one tokenizer and model. Takes seconds to make for a large vocabulary: keep it.

    Attributes:
        token_bytes: what each id stands for; empty for control tokens.
        llguidance_tokenizer, vocabulary: what an llguidance matcher and a `GrammarState` of it need.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int], vocab_size: int) -> None:
        """Read the spelling of every token.

        Args:
            tokenizer: the model's.
            eos_ids: every id that ends an answer; they need not be among the tokenizer's own.
            vocab_size: V, rows of the model's vocabulary.

        Raises:
            RequestError: an id outside the vocabulary, none at all, or a tokenizer whose tokens are not byte strings.
            CheckpointError: the tokenizer has more tokens than the model rows.
        """
        ends = sorted(set(eos_ids))
        if not ends or ends[0] < 0 or ends[-1] >= vocab_size:
            raise RequestError(f"end-of-sequence ids are {ends}; give at least one, all in 0..{vocab_size - 1}")
        tokenizer.check_rows(vocab_size)
        control = {*tokenizer.special_tokens.values(), *ends}
        if tokenizer.mask_id is not None:
            control.add(tokenizer.mask_id)
        added = {id_: text.encode() for id_, text in tokenizer.added_tokens.items()}
        try:
            plain = LLTokenizer(tokenizer.serialised, n_vocab=vocab_size, eos_token=ends, slices=[])
        except ValueError as error:
            reason = _explain(str(error))
            raise RequestError(f"{reason}; structured output needs a byte-level or byte-fallback tokenizer") from error
        tokens = tuple(
            b"" if id_ in control else added.get(id_) or (b"" if plain.is_special_token(id_) else plain.decode_bytes([id_]))
            for id_ in range(vocab_size)
        )
        self.token_bytes = tokens
        self.llguidance_tokenizer = LLTokenizer(TokenizerWrapper(_Spelling(tokenizer, plain, tokens, ends[0])), eos_token=ends)
        self.vocabulary = _Vocabulary(torch.tensor([bool(token) for token in tokens]), tuple(ends))

    def json_schema(self, schema: Mapping[str, Any] | str | bool) -> Grammar:
        """Grammar of the JSON texts that a schema (draft 2020-12) accepts, on one line, as `json.dumps` writes them.

        Properties come in the order of the schema, and others only where it mentions `additionalProperties`. Its top-level
        `x-guidance` changes the layout (docs/structured.md).

        Args:
            schema: as an object, as JSON text, or True for any JSON value.

        Raises:
            RequestError: not a schema, a keyword or format that is not supported, or one that nothing satisfies.
        """
        parsed = close_objects(read_schema(schema))
        _check_size("JSON schema", json.dumps(parsed))

        def describe(reason: str) -> str:
            where = f"JSON schema at {_locate(parsed, reason)}"
            return f"{where}: {reason}; change it, or leave it out and check the value afterwards"

        try:
            if inexact_number(parsed) is not None:
                return self.lark(f"start: %json {json.dumps(parsed)}")
            text = json.dumps(rewrite_schema(parsed))
        except RecursionError as error:
            raise RequestError("JSON schema is nested too deeply; flatten it, or use $defs") from error
        return self._compile(LLMatcher.grammar_from_json_schema(text), describe)

    def json_object(self) -> Grammar:
        """Grammar of any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Grammar of the texts that a regular expression matches from end to end.

        Args:
            pattern: in the syntax of Rust's `regex`, close to Python's: no look-around, back-references or word boundaries;
                `^` and `$` only at the ends.

        Raises:
            RequestError: not a regular expression, one that is not supported, or one that matches nothing.
        """
        _check_size("regex", pattern)
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise RequestError(f"regex {_short(pattern)} ends in a lone backslash; double it")

        def describe(reason: str) -> str:
            reason = re.sub(r"^line .*?\(in regex\): ", "", reason)
            return f"regex {_short(pattern)}: {reason}; use only what Rust's regex has: no look-around, no back-references"

        return self._compile(LLMatcher.grammar_from_regex(pattern), describe)

    def lark(self, grammar: str) -> Grammar:
        """Grammar in llguidance's variant of Lark; it may hold JSON schemas (`%json {...}`) and regular expressions.

        Args:
            grammar: rules, the first of them `start`. Rules over tokens (`<name>`, `<[7]>`) and the options `stop`,
                `max_tokens` and `temperature` are refused: a grammar speaks of text only.

        Raises:
            RequestError: a syntax error, a rule that is not there, or a grammar without sentences.
        """
        _check_size("Lark grammar", grammar)
        bare = _QUOTED.sub('""', grammar)
        for kind, match in (("token", _TOKEN_RULE.search(bare)), ("option", _TOKEN_OPTION.search(bare))):
            if match is not None:
                raise RequestError(f"Lark grammar: {kind} {match[0].rstrip(' =')} is not supported; write rules over text only")
        quoted = [match.span() for match in _QUOTED.finditer(grammar)]
        grammar = write_exactly(grammar, lambda position: any(start <= position < end for start, end in quoted))
        source = json.dumps({"grammars": [{"lark_grammar": grammar}]})
        return self._compile(source, lambda reason: f"Lark grammar: {reason}; correct that rule")

    def _compile(self, grammar: str, describe: Callable[[str], str]) -> Grammar:
        """Compile a grammar; `describe` makes the library's reason, in one line, a message.

        Raises:
            RequestError: the library does not take it, or nothing matches it.
        """
        matcher = LLMatcher(self.llguidance_tokenizer, grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise RequestError(describe(_explain(matcher.get_error())))
        first = GrammarState(matcher, self.vocabulary)
        try:
            first.allowed()
        except RequestError as error:
            reason = "nothing matches it" if str(error) == _DEAD_END else str(error)
            raise RequestError(describe(reason)) from error
        return Grammar(first)


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar: immutable, and shared by any number of requests and threads."""

    _first: GrammarState

    def start(self) -> GrammarState:
        """A new state at the beginning of a sentence."""
        return self._first.copy()


@dataclass(frozen=True)
class _Vocabulary:
    """Which of the V ids are text, and which end an answer."""

    is_text_V: Tensor
    eos_ids: tuple[int, ...]


class GrammarState:
    """One request's place in a grammar. Different states may be used in different threads, one state in one at a time.

    Where the grammar leaves a single continuation, only its canonical tokens are allowed (`forced`); elsewhere every token
    that keeps the text the beginning of a sentence.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        """Own a matcher. Make states with `Grammar.start`."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._forced: tuple[int, ...] | None = None
        self._allowed_V: Tensor | None = None
        self._ended = False

    @property
    def may_end(self) -> bool:
        """The text so far is a sentence of the grammar."""
        return self._ended or self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Nothing but an end-of-sequence token may follow; no forward is needed for the rest."""
        return self._ended or (self._matcher.is_stopped() and self.may_end)

    def allowed(self) -> Tensor:
        """Tokens that may come now.

        Returns:
            Bool [V], at least one True: text that keeps the beginning of a sentence, and every end-of-sequence id where the
            text is a sentence. The state's own; do not write to it.

        Raises:
            RequestError: the grammar is too complex here, or it has led into a dead end.
        """
        if self._allowed_V is not None:
            return self._allowed_V
        forced = self.forced()
        if forced or self.finished:
            allowed_V = torch.zeros_like(self._vocabulary.is_text_V)
            allowed_V[forced[:1]] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            bits_V = np.unpackbits(bits, count=len(self._vocabulary.is_text_V), bitorder="little")
            allowed_V = torch.from_numpy(bits_V.view(np.bool_)) & self._vocabulary.is_text_V
        if self.may_end:
            allowed_V[list(self._vocabulary.eos_ids)] = True
        if not allowed_V.any():
            raise RequestError(_DEAD_END)
        self._allowed_V = allowed_V
        return allowed_V

    def accepts(self, token: int) -> bool:
        """Whether a token may come now: `allowed()[token]`, without computing the rest."""
        if token in self._vocabulary.eos_ids:
            return self.may_end
        if self.finished or not 0 <= token < len(self._vocabulary.is_text_V) or not self._vocabulary.is_text_V[token]:
            return False
        forced = self.forced()
        return token == forced[0] if forced else self._matcher.validate_tokens([token]) == 1

    def advance(self, token: int) -> None:
        """Append a token to the text.

        After an end-of-sequence token only further ones are accepted.

        Raises:
            RequestError: the token is not allowed here, or the grammar has become too complex.
        """
        if not self.accepts(token):
            raise RequestError(f"token {token} is not allowed by the grammar here; choose one that is")
        self._allowed_V = None
        if token in self._vocabulary.eos_ids:
            self._ended = True
            return
        self._forced = (self._forced[1:] or None) if self._forced else None
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        """Tokens that must come now, in this order; none where there is a choice, or where the text may end.

        They spell bytes that the grammar leaves no choice about, as the tokenizer writes them: after the last token if these
        bytes continue it in its own spelling, else on their own. A last part that could merge with what follows is held
        back. Once given, the list stays: after `advance(forced()[0])`, `forced()` starts with the rest of it.

        Returns:
            Ids, possibly more than a block holds.

        Raises:
            RequestError: the grammar is too complex here.
        """
        if self._forced is None:
            forced = [] if self.finished else self._matcher.compute_ff_tokens()
            self._check()
            if forced and not self._vocabulary.is_text_V[forced].all():
                raise RequestError("the grammar asks for a control token; write rules over text only")
            self._forced = tuple(forced)
        return list(self._forced)

    def copy(self) -> GrammarState:
        """An independent state at the same place."""
        twin = GrammarState(self._matcher.deep_copy(), self._vocabulary)
        twin._forced, twin._ended = self._forced, self._ended
        twin._allowed_V = self._allowed_V
        return twin

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _explain(self._matcher.get_error())
            stuck = reason == "NoExtensionBias"
            raise RequestError(_DEAD_END if stuck else f"the grammar cannot go on: {reason}; simplify it")


def _explain(message: str) -> str:
    """The library's message in one line, without the source it quotes; `at 3(7):` is spelled out."""
    lines = [line.strip() for line in message.splitlines() if line.strip() and not line.startswith((" ", "<"))]
    text = _PLACE.sub(r"line \1, column \2: ", " ".join(lines))
    return _short_line(text.replace("regex parse error: error: ", ""), 300)


def _short_line(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _short(value: object) -> str:
    return _short_line(repr(value), 80)


def _check_size(kind: str, text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(f"{kind} has {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS} are compiled")


def _locate(schema: Mapping[str, Any], reason: str) -> str:
    """JSON pointer of the innermost part of a schema that is refused for the same reason on its own."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    innermost, budget = "#", _MAX_LOCATED_CHARACTERS
    for pointer, part in parts(schema):
        text = json.dumps({**part, **shared})
        budget -= len(text)
        if budget < 0:
            break
        refused = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text), limits=_limits())
        if pointer.startswith(f"{innermost}/") and _explain(refused) == reason:
            innermost = pointer
    return innermost
