"""Decoding under a grammar, both kinds: always a sentence or the beginning of one, exact at the frontier, alone and in batches.

The grammar's own soundness is in `test_grammar.py`; here it is met with blocks, sampling, budgets and neighbours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import SPECIAL_TOKENS, make_tokenizer, refused
from tiny import tiny_model, with_params
from unmask.data.detokenizer import find_stop
from unmask.data.tokenizer import Tokenizer
from unmask.diffusion.decode import Guess
from unmask.engine.acceptance import Draft
from unmask.engine.drafting import DraftPlan
from unmask.engine.grammar import GrammarState
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sequences.base import NOTHING_LEFT, ModelOutput
from unmask.engine.sequences.speculative import SpeculativeSequence
from unmask.errors import RequestError

PHONE = r"[0-9]{3}-[0-9]{4}"
PHONE_BEGINNING = re.compile(r"[0-9]{0,3}|[0-9]{3}-[0-9]{0,4}")
WORDS = r"([a-z]{1,3} ){2}(cat|category|dog)s?"
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "get_weather"},
        "arguments": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 4},
                "days": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


class Kit:
    """A tokenizer, a diffusion, an autoregressive and a shifted model of its vocabulary, the last two alike; float64."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        assert tokenizer.mask_id is not None
        self.mask_id = tokenizer.mask_id
        self.eos = tokenizer.special_tokens["<|endoftext|>"]
        shape: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "eos_ids": (self.eos,)}
        diffusion = tiny_model("llama", 1, torch.float64, mask_id=self.mask_id, block_size=4, token_editing=True, **shape)
        self.diffusion = LanguageModel(diffusion, tokenizer, name="tiny")
        self.causal = LanguageModel(tiny_model("qwen3", 1, torch.float64, **shape), tokenizer, name="tiny-ar")
        diffusing = {"mask_id": self.mask_id, "block_size": 4, "start_id": self.eos}
        shifted = tiny_model("qwen3", 1, torch.float64, **shape, **diffusing)
        self.shifted = LanguageModel(shifted, tokenizer, name="tiny-shifted")
        self.ids = tokenizer.encode("What is 2 + 3?")

    def model(self, kind: str) -> LanguageModel:
        return {"diffusion": self.diffusion, "causal": self.causal, "speculative": self.shifted}[kind]

    def text(self, completion: Completion) -> str:
        """Without the end, everything else spelled out."""
        ends = {self.eos, *self.tokenizer.eos_ids}
        ids = [token for token in completion.ids if token not in ends]
        assert not set(ends) & set(completion.ids[:-1])
        return self.tokenizer.decode(ids, skip_special=False)

    def request(self, kind: str, *, ids: Sequence[int] | None = None, **options: Any) -> Request:
        return self.model(kind).request(self.ids if ids is None else ids, **{"max_new_tokens": 110, **options})

    def run(self, kind: str, *requests: Request, **options: Any) -> list[Completion]:
        engine = self.model(kind).engine(**{"num_tokens": 512, **options})
        completions = engine.run(requests)
        engine.pool.check()
        assert engine.pool.num_used == 0
        assert kind == "causal" or all(self.mask_id not in completion.ids for completion in completions)
        return completions


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Kit(make_tokenizer(folder, special_tokens=(*SPECIAL_TOKENS, "<|mask|>"), mask_token="<|mask|>"))


def is_call(text: str) -> bool:
    value = json.loads(text)
    arguments = value["arguments"]
    assert (set(value), set(arguments)) == ({"name", "arguments"}, {"city", "days"})
    return value["name"] == "get_weather" and len(arguments["city"]) <= 4 and 0 <= arguments["days"] <= 99


KINDS = ("diffusion", "causal", "speculative")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.0},
    {"threshold": 0.01, "block_size": 8},
    {"threshold": 0.3, "block_size": 1},
    {"threshold": 0.02, "block_size": 16, "steps": 2, "temperature": 1.5, "seed": 1},
    {"threshold": 0.0, "block_size": 32, "temperature": 0.7, "top_k": 40, "seed": 2},
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_completion_is_a_sentence_of_its_grammar(kit: Kit, kind: str, options: dict[str, Any]) -> None:
    phone, words, call = kit.run(
        kind,
        kit.request(kind, regex=PHONE, **options),
        kit.request(kind, regex=WORDS, **options),
        kit.request(kind, json_schema=CALL, **options),
    )
    assert {completion.finish_reason for completion in (phone, words, call)} == {"stop"}
    assert re.fullmatch(PHONE, kit.text(phone))
    assert re.fullmatch(WORDS, kit.text(words))
    assert is_call(kit.text(call))


def test_a_compiled_grammar_serves_many_requests(kit: Kit) -> None:
    compiled = kit.diffusion.grammars.regex(PHONE)
    for seed in (0, 1):
        expected, found = (
            kit.diffusion.complete(kit.ids, max_new_tokens=20, temperature=1.0, seed=seed, **grammar)
            for grammar in ({"regex": PHONE}, {"grammar": compiled})
        )
        assert found == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [1, 3, 5, 7])
def test_a_completion_cut_by_its_budget_is_the_beginning_of_a_sentence(
    kit: Kit, kind: str, options: dict[str, Any], budget: int
) -> None:
    """Also when the grammar completes the sentence in the same step, beyond the budget: that is no stop."""
    (found,) = kit.run(kind, kit.request(kind, regex=PHONE, max_new_tokens=budget, **options))
    whole = re.fullmatch(PHONE, kit.text(found)) is not None  # a token may be two digits
    assert found.finish_reason == ("stop" if whole else "length")
    assert whole or len(found.ids) == budget
    assert PHONE_BEGINNING.fullmatch(kit.text(found))


@pytest.mark.parametrize("kind", KINDS)
def test_forced_text_costs_no_forward(kit: Kit, kind: str) -> None:
    sentence = "The quick brown fox jumps over the lazy dog."
    (whole,) = kit.run(kind, kit.request(kind, regex=re.escape(sentence)))
    assert (kit.text(whole), whole.finish_reason, whole.forwards) == (sentence, "stop", 0)
    (one,) = kit.run(kind, kit.request(kind, regex=re.escape(sentence) + "[0-9]"))
    assert re.fullmatch(re.escape(sentence) + "[0-9]", kit.text(one))
    assert one.forwards == 1
    (cut,) = kit.run(kind, kit.request(kind, regex=re.escape(sentence), max_new_tokens=5))
    assert (cut.finish_reason, len(cut.ids), cut.forwards) == ("length", 5, 0)
    assert sentence.startswith(kit.text(cut))
    (call,) = kit.run(kind, kit.request(kind, json_schema=CALL))
    assert call.forwards < len(call.ids) / 2, "most of a call is forced"


def test_updates_of_a_request_without_a_choice(kit: Kit) -> None:
    engine = kit.diffusion.engine(num_tokens=512)
    for request in (kit.request("diffusion", regex="abcdefghijkl"), kit.request("diffusion", regex="abcdefghijkl[0-9]")):
        updates = list(engine.stream(request))
        completion = updates[-1].completion
        assert completion is not None
        assert sum((update.new_ids for update in updates), ()) == completion.ids
    assert not engine.has_work


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_alone(kit: Kit, kind: str) -> None:
    """Grammars, stops and plain requests share forwards, cache blocks run out, prompts are shared: no token changes."""
    requests = [
        kit.request(kind, max_new_tokens=30, trace=True, **options)
        for options in (
            {"regex": PHONE, "threshold": 0.0},
            {"json_schema": CALL, "threshold": 0.02, "block_size": 8},
            {"regex": WORDS, "temperature": 1.2, "seed": 3},
            {"ids": kit.ids[:5]},
            {"stop": "a", "temperature": 2.0, "seed": 1},
            {"json_schema": CALL, "threshold": 0.02, "block_size": 8, "logprobs": 2},
        )
    ]
    alone = [kit.run(kind, request, prefix_cache=False)[0] for request in requests]
    for options in (
        {},
        {"cache_block_size": 1, "num_tokens": 40, "prefix_cache": False},
        {"cache_block_size": 3, "max_num_batched_tokens": 8, "max_num_seqs": 3},
    ):
        together = kit.run(kind, *requests, **options)
        for found, expected in zip(together, alone, strict=True):
            assert (found.ids, found.finish_reason, found.text) == (expected.ids, expected.finish_reason, expected.text)
            # The drafts depend on the room in a forward, the target tokens do not.
            assert kind == "speculative" or [s.tokens for s in found.trace] == [s.tokens for s in expected.trace]
        if kind == "diffusion" and "num_tokens" in options:
            assert sum(completion.costs.preemptions for completion in together) >= 1


def test_provisional_tokens_are_masked_again_when_wrong(kit: Kit) -> None:
    """The frontier is unsure, a token right of it is not; when the frontier arrives, it takes back what is not allowed."""
    masked_again = decided = 0
    for threshold, temperature in ((0.2, 0.0), (0.3, 0.0), (0.4, 0.6)):
        request = kit.request(
            "diffusion", json_schema=CALL, threshold=threshold, temperature=temperature, block_size=16, trace=True
        )
        (found,) = kit.run("diffusion", request)
        assert is_call(kit.text(found))
        canvas = {len(kit.ids) + i: token for i, token in enumerate(found.ids)}
        for step in found.trace:
            for i, (token, accepted) in enumerate(zip(step.tokens, step.accepted, strict=True)):
                if accepted and (step.start + i) in canvas:
                    masked_again += canvas[step.start + i] != token
                    decided += canvas[step.start + i] == token
    assert masked_again > 0
    assert decided > 0


@torch.inference_mode()
def frontier_oracle(kit: Kit, request: Request) -> list[int]:
    """Threshold 1: one free token a forward, the likeliest allowed one, from the whole canvas; then what is forced."""
    assert request.grammar is not None
    state, size = request.grammar.start(), request.params.block_size
    text = [token for token in request.ids if token is not None]
    while True:
        for token in state.forced():
            state.advance(token)
            text.append(token)
        if state.finished:
            return text[len(request.ids) :]
        end = (len(text) // size + 1) * size
        canvas = [*text, *[kit.mask_id] * (end - len(text))]
        logits_V = kit.diffusion.logits(canvas, block_size=size)[len(text)]
        token = int(logits_V.masked_fill(~state.allowed(), float("-inf")).argmax())
        text.append(token)
        if token == kit.eos:
            return text[len(request.ids) :]
        state.advance(token)


@pytest.mark.parametrize("grammar", [{"regex": PHONE}, {"regex": WORDS}, {"json_schema": CALL}], ids=["phone", "words", "call"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_frontier_takes_the_likeliest_allowed_token(kit: Kit, grammar: dict[str, Any], block_size: int) -> None:
    request = kit.request("diffusion", threshold=1.0, block_size=block_size, **grammar)
    assert list(kit.run("diffusion", request)[0].ids) == frontier_oracle(kit, request)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_samples_differ_and_repeat(kit: Kit, kind: str) -> None:
    base = kit.request(kind, regex=r"[0-9]{12}", temperature=1.5, threshold=0.05)
    drawn = [replace(base, sample=n, params=base.params.replace(seed=seed)) for seed in (0, 1) for n in (0, 1, 2)]
    first = [completion.ids for completion in kit.run(kind, *drawn)]
    assert len(set(first)) == 6
    assert [completion.ids for completion in kit.run(kind, *drawn[::-1])] == first[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_bias_and_least_length_hold_under_a_grammar(kit: Kit, kind: str) -> None:
    (free,) = kit.run(kind, kit.request(kind, regex=r"[0-9]{8}"))
    digits = {token for token in free.ids if token != kit.eos}
    banned = dict.fromkeys(digits, float("-inf"))
    (found,) = kit.run(kind, kit.request(kind, regex=r"[0-9]{8}", logit_bias=banned))
    assert re.fullmatch(r"[0-9]{8}", kit.text(found))
    assert not digits & set(found.ids)
    for least in (0, 9):
        (long,) = kit.run(
            kind, kit.request(kind, regex=r"[0-9]*", min_new_tokens=least, logit_bias={kit.eos: 1e4}, max_new_tokens=20)
        )
        assert len(long.ids) == max(least + 1, 1)
        assert long.ids[-1] == kit.eos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("by", ["bias", "stop tokens", "bias of the first token"])
def test_a_request_without_a_way_on_fails_alone(kit: Kit, kind: str, temperature: float, by: str) -> None:
    """Everything the grammar allows is banned: an error for this request, none for its neighbours."""
    letters = [token for spelling in ("a", "b") for token in kit.tokenizer.encode(spelling)]
    options: dict[str, Any] = {"regex": r"[ab]", "logit_bias": dict.fromkeys(letters, float("-inf"))}
    if by == "stop tokens":
        options = {"regex": r"[ab]", "stop_token_ids": letters, "min_new_tokens": 1}
    elif by == "bias of the first token":
        options = {"regex": "|[ab]", "logit_bias": dict.fromkeys([*kit.model(kind).eos_ids, *letters], float("-inf"))}
        assert kit.eos == 0, "of tokens that are all banned the first, and one that the grammar allows"
    dead, alive = kit.request(kind, temperature=temperature, **options), kit.request(kind, regex=PHONE)
    with refused(RequestError, NOTHING_LEFT):
        kit.run(kind, dead)
    engine = kit.model(kind).engine(num_tokens=512)
    numbers = [engine.add(dead), engine.add(alive)]
    updates = []
    while engine.has_work:
        updates += engine.step()
    failed = [update for update in updates if update.number == numbers[0]]
    assert [str(update.error) for update in failed] == [NOTHING_LEFT]
    completion = updates[-1].completion
    assert completion is not None
    assert completion.ids == kit.run(kind, alive)[0].ids
    assert engine.pool.num_used == 0
    engine.pool.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_grammar_that_cannot_go_on_fails_alone(kit: Kit, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, alive = kit.request(kind, regex=r"[a-z]{9}"), kit.request(kind, max_new_tokens=12)
    expected = kit.run(kind, alive)[0].ids
    allowed, calls = GrammarState.allowed, list[None]()

    def limited(state: GrammarState) -> torch.Tensor:
        if state._allowed_V is None:
            calls.append(None)
            if len(calls) >= 3:
                raise RequestError("the grammar cannot go on")
        return allowed(state)

    monkeypatch.setattr(GrammarState, "allowed", limited)
    engine = kit.model(kind).engine(num_tokens=512)
    numbers = [engine.add(dead), engine.add(alive)]
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert [str(update.error) for update in updates if update.error is not None] == ["the grammar cannot go on"]
    (completion,) = (update.completion for update in updates if update.completion is not None)
    assert completion.ids == expected
    assert next(update.number for update in updates if update.error is not None) == numbers[0]
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("grammar", ['start: "abc" A\nA: /a/ & /b/', 'start: "abc" x\nx: "d" x'], ids=["dead end", "endless"])
def test_a_grammar_that_forces_text_and_then_cannot_go_on_fails_alone(kit: Kit, kind: str, scored: bool, grammar: str) -> None:
    """Before its first forward: it is refused, or gets an error once its prompt is scored; `step` raises nothing."""
    dead = kit.request(kind, grammar=grammar, max_new_tokens=12, prompt_logprobs=0 if scored else None)
    alive = kit.request(kind, max_new_tokens=12)
    engine, errors, completions = kit.model(kind).engine(num_tokens=512), list[str](), list[Completion]()
    engine.add(alive)
    try:
        engine.add(dead)
    except RequestError as error:
        errors.append(str(error))
    while engine.has_work:
        for update in engine.step():
            errors += [] if update.error is None else [str(update.error)]
            completions += [] if update.completion is None else [update.completion]
    assert len(errors) == 1
    assert "grammar" in errors[0]
    assert [each.ids for each in completions] == [kit.run(kind, alive)[0].ids]
    assert engine.pool.num_used == 0
    engine.pool.check()


def logprobs_of(model: LanguageModel, canvas: Sequence[int], place: int, mask_id: int | None, block_size: int) -> torch.Tensor:
    """[V]: of the token at `place`, under the model's own distribution."""
    if mask_id is None:
        return model.logits(canvas[:place])[-1].log_softmax(-1)
    end = (place // block_size + 1) * block_size
    logits_V = model.logits(canvas[:end], block_size=block_size)[place].clone()
    logits_V[mask_id] = float("-inf")
    return logits_V.log_softmax(-1)


def canvases(request: Request, steps: Sequence[DecodingStep], mask_id: int) -> list[list[int]]:
    """The canvas before every step."""
    canvas = [mask_id if token is None else token for token in request.ids]
    canvas += [mask_id] * (request.canvas_length - len(canvas))
    before = []
    for step in steps:
        before.append(list(canvas))
        for i, token in enumerate(step.tokens):
            canvas[step.start + i] = mask_id if token is None else token
    return before


@pytest.mark.parametrize("kind", ["diffusion", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.02},
        {"threshold": 0.02, "temperature": 1.5, "seed": 4, "logit_bias": {20: 3.0, 21: float("-inf")}},
        {"threshold": 0.02, "edit_threshold": 0.01, "max_post_steps": 3},
    ],
    ids=["greedy", "sampled with bias", "edited"],
)
def test_logprobs_are_the_models_own_at_the_step_that_decided(kit: Kit, kind: str, options: dict[str, Any]) -> None:
    if kind == "causal":
        options = {name: value for name, value in options.items() if name != "edit_threshold"}
    request = kit.request(kind, max_new_tokens=11, logprobs=3, trace=True, eos_id=[], **options)
    (found,) = kit.run(kind, request)
    assert found.logprobs is not None
    assert tuple(entry.token for entry in found.logprobs) == found.ids
    mask_id = None if kind == "causal" else kit.mask_id
    before = canvases(request, found.trace, kit.mask_id)
    decided = {}  # by the last step that decided or edited it
    for number, step in enumerate(found.trace):
        for i, (accepted, edited) in enumerate(zip(step.accepted, step.edited, strict=True)):
            if accepted or edited:
                decided[step.start + i] = number
    for i, entry in enumerate(found.logprobs):
        place = len(kit.ids) + i
        row_V = logprobs_of(kit.model(kind), before[decided[place]], place, mask_id, request.params.block_size)
        assert float(row_V.exp().sum()) == pytest.approx(1.0, abs=1e-5)
        assert entry.logprob == pytest.approx(float(row_V[entry.token]), abs=1e-4)
        best = row_V.topk(3)
        assert [token for token, _ in entry.alternatives] == best.indices.tolist()
        assert [value for _, value in entry.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
    plain = kit.run(kind, with_params(request, logprobs=None))[0]
    assert (plain.ids, plain.logprobs) == (found.ids, None), "asking changes nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_forced_tokens_have_logprob_0_and_others_their_own(kit: Kit, kind: str) -> None:
    (found,) = kit.run(kind, kit.request(kind, regex=PHONE, logprobs=0, threshold=0.0))
    assert found.logprobs is not None
    assert all(entry.alternatives == () for entry in found.logprobs)
    values = {
        entry.logprob for entry, token in zip(found.logprobs, found.ids, strict=True) if token == kit.tokenizer.encode("-")[0]
    }
    assert values == {0.0}
    free = [entry.logprob for entry in found.logprobs[:3]]
    assert all(value < 0.0 for value in free)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_before_themselves(kit: Kit, kind: str) -> None:
    base = kit.request(kind, max_new_tokens=40, temperature=1.5, seed=5, eos_id=[], threshold=0.1)
    (endless,) = kit.run(kind, base)
    text = kit.tokenizer.decode(endless.ids)
    for length in (1, 2, 5):
        stop = text[12 : 12 + length]
        (found,) = kit.run(kind, with_params(base, stop=("never to be found", stop)))
        assert (found.finish_reason, found.stop) == ("stop", stop)
        assert found.text == text[: text.index(stop)]
        assert found.ids == endless.ids[: len(found.ids)]
        assert stop in kit.tokenizer.decode(found.ids)
        assert stop not in kit.tokenizer.decode(found.ids[:-1]), "no token more than it takes"
    (whole,) = kit.run(kind, with_params(base, stop=("never to be found",)))
    assert (whole.ids, whole.text, whole.stop, whole.finish_reason) == (endless.ids, text, None, "length")
    answer = kit.model(kind).generate("What?", max_new_tokens=30, temperature=1.5, seed=5, eos_id=[], stop=text[3], chat=False)
    assert text[3] not in answer.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_within_the_least_tokens_does_not_count(kit: Kit, kind: str) -> None:
    base = kit.request(kind, max_new_tokens=40, temperature=1.5, seed=5, eos_id=[], threshold=0.1)
    (endless,) = kit.run(kind, base)
    text, least = kit.tokenizer.decode(endless.ids), 12
    inside = kit.tokenizer.decode(endless.ids[:least])
    stop = next(character for character in text[len(inside) :] if character in inside)
    (found,) = kit.run(kind, with_params(base, stop=(stop,), min_new_tokens=least))
    assert (found.finish_reason, found.text) == ("stop", text[: text.index(stop, len(inside))])
    once = next(piece for piece in (inside[i : i + 3] for i in range(len(inside) - 2)) if text.count(piece) == 1)
    (whole,) = kit.run(kind, with_params(base, stop=(once,), min_new_tokens=least))
    assert (whole.ids, whole.stop, whole.finish_reason) == (endless.ids, None, "length")


def test_of_several_stop_strings_the_first_in_the_text_counts(kit: Kit) -> None:
    text = "The answer is 5. Hello, how are you?"
    ids = kit.tokenizer.encode(text)

    def find(*stops: str, searched: int = 0) -> tuple[int, str, str] | None:
        return find_stop(kit.tokenizer.decode, ids, searched, stops)

    assert find("nothing", "else") is None
    count, before, stop = find("how", "Hello", "5") or (0, "", "")
    assert (before, stop) == ("The answer is ", "5")
    assert kit.tokenizer.decode(ids[:count]).endswith("5")
    whole, before, _ = find("?") or (0, "", "")
    assert (whole, before) == (len(ids), text[:-1])
    assert find("Hello", searched=count) == find("Hello"), "what was searched already may be skipped"
    assert (find("swer is 5", "answer") or (0, "", ""))[1:] == ("The ", "answer"), "the one that begins first"


@pytest.mark.parametrize("grammar", [{"regex": PHONE}, {"regex": WORDS}, {"json_schema": CALL}], ids=["phone", "words", "call"])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_a_speculative_sentence_is_the_parents(kit: Kit, grammar: dict[str, Any], threshold: float) -> None:
    """In fewer forwards or as many: what the grammar forces takes none, and drafts that agree with it are accepted."""
    request = kit.request("causal", ids=[kit.eos, *kit.ids], logit_bias={kit.mask_id: float("-inf")}, logprobs=0, **grammar)
    (expected,) = kit.run("causal", request)
    for block_size in (2, 4, 8):
        options = {"threshold": threshold, "block_size": block_size, "logprobs": 0, **grammar}
        (found,) = kit.run("speculative", kit.request("speculative", **options))
        assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
        assert found.forwards <= expected.forwards
        assert found.logprobs is not None
        assert expected.logprobs is not None
        forced = [entry.logprob == 0.0 for entry in expected.logprobs]
        assert [entry.logprob == 0.0 for entry in found.logprobs] == forced


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
def test_a_sentence_that_nothing_may_follow_ends_there_with_drafts_and_without(kit: Kit, num_drafts: int) -> None:
    """What a verify token behind the end predicts, an end of text, is no part of it."""
    (letter,) = kit.tokenizer.encode("a")
    request = kit.request("causal", regex="(a|b){3}", logprobs=0)
    sequence = SpeculativeSequence(request, 0, None, 4, kit.tokenizer.decode)
    while sequence.completion is None:
        position = len(sequence.tokens) - len(kit.ids)
        drafts = [Draft(letter, 0.5, ("lookup", 0, 0), 0.5)] * num_drafts
        sequence.follow_plan(DraftPlan(tuple(drafts[: 4 - position])))
        scheduled = sequence.schedule(64)
        assert scheduled is not None
        targets = [letter if position + i < 3 else kit.eos for i in range(len(scheduled.queries))]
        logits_NV = torch.zeros(len(targets), kit.tokenizer.vocab_size)
        sequence.apply(scheduled, ModelOutput(Guess(scheduled.queries, targets, [0.9] * len(targets)), logits_NV, logits_NV))
        assert len(sequence.tokens) >= sequence.committed
    assert sequence.completion.ids == (letter,) * 3
    assert (sequence.completion.text, sequence.completion.finish_reason) == ("aaa", "stop")
    assert len(sequence.completion.logprobs or ()) == 3
