"""The prompt generator: the same for a seed, disjoint splits, nothing of the held-out prompts."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import prompts as generator
import pytest
from prompts import GRAMMARS, HELD_OUT, SHARES, HeldOut, Prompt, draw, ngrams, prompts, read_grammar, split_of
from prompts_grammar import Alternative, Grammar, read_sections

COUNT = 3_000
PARAGRAPHS = [f"Harbour {number} is a place {{where}} ships shelter. It was built by people." for number in range(60)]


@pytest.fixture(scope="module")
def generated() -> list[Prompt]:
    return prompts(COUNT, 0, PARAGRAPHS)


def write_grammar(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_same_seed_same_prompts_and_another_seed_others() -> None:
    first, again, other = prompts(300, 1), prompts(300, 1), prompts(300, 2)
    assert first == again
    assert len({prompt.id for prompt in first} & {prompt.id for prompt in other}) < 60


def test_prompts_are_distinct_and_of_all_kinds(generated: list[Prompt]) -> None:
    assert len({prompt.id for prompt in generated}) == COUNT
    counts = {kind: sum(prompt.kind == kind for prompt in generated) for kind in SHARES}
    total = sum(SHARES.values()) + generator.DOCUMENT_SHARE
    for kind, share in SHARES.items():
        assert abs(counts[kind] - COUNT * share / total) <= 2
    assert any(len(prompt.turns) > 1 for prompt in generated)
    assert any(prompt.system for prompt in generated)


def test_no_prompt_is_unfinished(generated: list[Prompt]) -> None:
    for prompt in generated:
        assert all(turn.strip() for turn in prompt.turns)
        text = "\n".join([prompt.system or "", *prompt.turns]).replace("{where}", "")
        assert not re.search(r"\{\^?(a )?[a-z_]+(:\w+)?\}| >> |system: ", text)


def test_there_are_tens_of_thousands_of_every_kind() -> None:
    grammar = read_grammar()
    assert min(grammar.num_texts(kind) for kind in SHARES) > 100_000


def test_every_kind_has_a_grammar() -> None:
    kinds = {path.stem for path in GRAMMARS.glob("*.txt") if not path.stem.startswith("words_")}
    assert kinds == {*SHARES, "document"}
    assert sum(SHARES.values()) == 108


def test_splits_are_disjoint_by_given_text(generated: list[Prompt]) -> None:
    by_text: dict[str, set[str]] = {}
    for prompt in generated:
        text = max((part for turn in prompt.turns for part in turn.split("\n\n")), key=len)
        by_text.setdefault(text, set()).add(prompt.split)
    assert all(len(splits) == 1 for splits in by_text.values())
    assert {split for splits in by_text.values() for split in splits} == {"train", "validation", "test"}


def test_split_ignores_case_and_white_space() -> None:
    texts = [f"text number {number}" for number in range(500)]
    assert [split_of(text) for text in texts] == [split_of(f" {text.upper()}\n") for text in texts]
    shares = {split: sum(split_of(text) == split for text in texts) / 500 for split in ("validation", "test")}
    assert all(0.005 < share < 0.05 for share in shares.values())


def held_out_texts() -> list[str]:
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    return [message["content"] for record in records for message in record["messages"] if message["role"] == "user"]


def test_held_out_prompts_are_a_hundred_of_ten_kinds() -> None:
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    kinds = [record["kind"] for record in records]
    assert len(set(kinds)) == 10
    assert all(kinds.count(kind) == 10 for kind in kinds)
    assert len({record["id"] for record in records}) == 100
    assert all(record["messages"][-1]["role"] == "user" for record in records)


def test_no_held_out_prompt_can_be_generated(generated: list[Prompt]) -> None:
    """`prompts` leaves out what the filter recognises; the filter recognises every held-out prompt and every part of one."""
    held_out = HeldOut.read()
    for text in held_out_texts():
        assert text in held_out
        assert f"Please: {text.upper()}" in held_out or len(text.split()) < generator.NGRAM
        for paragraph in text.split("\n\n"):
            if len(paragraph.split()) >= generator.NGRAM:
                assert f"Summarize this:\n\n{paragraph}" in held_out
    assert not any(turn in held_out for prompt in generated for turn in prompt.turns)


def test_few_word_sequences_are_shared_with_held_out_prompts(generated: list[Prompt]) -> None:
    size = 4
    common = {ngram for prompt in generated for turn in prompt.turns for ngram in ngrams(turn.lower().split(), size)}
    held = [ngram for text in held_out_texts() for ngram in ngrams(text.lower().split(), size)]
    assert sum(ngram in common for ngram in held) / len(held) < 0.03


def test_an_exhausted_kind_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "SHARES", {"question": 1})
    monkeypatch.setattr(generator, "read_grammar", lambda _: Grammar({"question": [Alternative("Why?")]}))
    monkeypatch.setattr(generator, "MAX_DUPLICATES", 10)
    with pytest.raises(ValueError, match="question"):
        prompts(5, 0)


def test_system_messages_and_turns_are_taken_apart() -> None:
    grammar = Grammar({"turns": [Alternative("system: be brief >> a? >> b?")]})
    rng = random.Random(0)
    drawn = {draw(grammar, "turns", rng) for _ in range(50)}
    assert {prompt.system for prompt in drawn} == {"be brief"}
    assert {len(prompt.turns) for prompt in drawn} == {2}
    assert Prompt("turns", ("A?", "B?"), "be brief") in drawn


def test_grammar_labels_articles_capitals_and_numbers(tmp_path: Path) -> None:
    text = "# comment\n[start]\n{^a thing:1} and {thing:1}, {2-2} {other}\\nend\n[thing]\nowl\n[other]\n%3 ufo\n"
    grammar = Grammar(read_sections([write_grammar(tmp_path / "g.txt", text)]))
    assert grammar.expand("start", random.Random(0)) == "An owl and owl, 2 ufo\nend"
    assert grammar.num_texts("start") == 1


def test_grammar_prefers_different_values_within_a_line() -> None:
    grammar = Grammar({"start": [Alternative("{x} {x}")], "x": [Alternative("a"), Alternative("b")]})
    rng = random.Random(0)
    texts = [grammar.expand("start", rng) for _ in range(200)]
    assert sum(text in ("a a", "b b") for text in texts) < 30


def test_literal_text_is_not_expanded() -> None:
    grammar = Grammar({"start": [Alternative("<{x}>")], "x": [Alternative("{y}", is_literal=True)]})
    assert grammar.expand("start", random.Random(0)) == "<{y}>"


@pytest.mark.parametrize(
    ("text", "named"),
    [("[a]\n{missing}\n", "missing"), ("[a]\nx\n[a]\ny\n", "defined twice"), ("x\n", "before the first"), ("[a]\n", "0 alt")],
)
def test_faulty_grammars(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Grammar(read_sections([write_grammar(tmp_path / "g.txt", text)]))


def test_a_free_text_is_in_one_turn_whatever_it_holds() -> None:
    paragraph = "In Python x << n and x >> n shift the bits of a number."
    grammar = read_grammar([paragraph])
    for seed in range(20):
        assert paragraph in draw(grammar, "document", random.Random(seed)).turns[0]
