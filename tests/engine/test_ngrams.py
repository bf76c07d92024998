"""N-grams: the table against a count by definition, what is not counted, its file; and drafts that change no text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from tiny import MASK, tiny_model
from unmask.data.documents import Document
from unmask.engine.costs import CostTable
from unmask.engine.draft_statistics import DraftStatistics
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.ngrams import LONGEST_CONTEXT, NgramTable, count_ngrams, find_ngrams, load_ngrams, merge_tables
from unmask.errors import CheckpointError, DataError
from unmask.models.weights.hub import EMBEDDED, NGRAMS

LIKE, UNLIKELY, DOUBT = 0.25, 0.15, (2.5, 2.0, 1.5, 1.2)


def document(tokens: list[int], written: list[bool] | None = None) -> Document:
    flags = [True] * len(tokens) if written is None else written
    return Document(np.array(tokens, np.int32), np.array(flags, np.bool_))


def by_definition(documents: list[Document], text: list[int]) -> tuple[int, float] | None:
    """What follows `text`: of each of its ends, longer and longer, the most frequent token if it says something new."""
    found: tuple[int, float] | None = None
    told = (-1, 0.0)
    for length in range(1, min(LONGEST_CONTEXT, len(text)) + 1):
        follows: Counter[int] = Counter()
        for each in documents:
            tokens = each.tokens.tolist()
            for place in range(length, len(tokens)):
                if each.maskable[place] and tokens[place - length : place] == text[-length:]:
                    follows[tokens[place]] += 1
        if not follows or max(follows.values()) < 2:
            break
        token = min(token for token in follows if follows[token] == max(follows.values()))
        likeliest = token, (follows[token] - 0.5) / (follows.total() + DOUBT[length - 1])
        is_alike = token == told[0] and abs(likeliest[1] - told[1]) <= LIKE
        if not is_alike and max(likeliest[1], told[1]) >= UNLIKELY:
            found = told = likeliest
    return found


tokens_of_a_text = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(st.lists(st.tuples(tokens_of_a_text, st.integers(0, 40)), min_size=1, max_size=3), tokens_of_a_text)
def test_the_table_says_what_a_count_by_definition_says(texts: list[tuple[list[int], int]], text: list[int]) -> None:
    documents = [document(tokens, [i >= given for i in range(len(tokens))]) for tokens, given in texts]
    try:
        table = count_ngrams(documents)
    except DataError:
        assert by_definition(documents, text) is None
        return
    expected, found = by_definition(documents, text), table.next(text)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.token == expected[0]
        assert found.probability == pytest.approx(expected[1], abs=0.5 / 255)


def test_prompts_are_context_and_not_counted() -> None:
    table = count_ngrams([document([5, 6, 5, 6, 5, 7, 5, 7], [False] * 4 + [True] * 4)])
    assert table.next([6, 5]) == table.next([9, 5])
    following = table.next([5])
    assert following is not None
    assert following.token == 7
    assert table.next([]) is None


def test_contexts_do_not_reach_into_another_document() -> None:
    table = count_ngrams([document([1, 2]), document([3, 2]), document([1, 2, 3])])
    assert table.next([2]) is None
    assert table.next([1]) is not None


@given(st.lists(st.lists(tokens_of_a_text, min_size=1, max_size=3), min_size=1, max_size=3), tokens_of_a_text)
def test_of_several_tables_the_surest_counts(texts: list[list[list[int]]], text: list[int]) -> None:
    tables = []
    for part in texts:
        try:
            tables.append(count_ngrams([document(tokens) for tokens in part]))
        except DataError:
            continue
    if not tables:
        return
    merged = merge_tables(tables)
    entries = [dict(zip(each.keys.tolist(), zip(each.tokens, each.probabilities, strict=True), strict=True)) for each in tables]
    assert merged.keys.tolist() == sorted(set().union(*entries))
    for key, token, probability in zip(merged.keys.tolist(), merged.tokens, merged.probabilities, strict=True):
        found = [each[key] for each in entries if key in each]
        assert probability == max(p for _, p in found)
        assert token == next(t for t, p in found if p == probability)
    if len(tables) == 1:
        assert merged.next(text) == tables[0].next(text)


@pytest.mark.parametrize("documents", [[], [document([1, 2], [False, False])], [document([1, 2, 3])]])
def test_data_without_a_repetition_are_refused(documents: list[Document]) -> None:
    with refused(DataError, "text" if not documents else "the"):
        count_ngrams(documents)


@pytest.fixture
def table() -> NgramTable:
    return count_ngrams([document([1, 2, 3, 1, 2, 3, 1, 2, 3])])


def test_a_table_is_read_as_it_was_written(table: NgramTable, tmp_path: Path) -> None:
    table.save(tmp_path / NGRAMS)
    again = find_ngrams("mine", tmp_path, 4)
    assert again is not None
    assert len(again) == len(table) > 0
    for text in ([1], [1, 2], [2, 3], [9]):
        assert again.next(text) == table.next(text)
    assert find_ngrams("mine", tmp_path / "elsewhere", 4) is None
    assert find_ngrams("mine", None, 4) is None


def test_what_is_not_a_table_of_this_model_is_named(table: NgramTable, tmp_path: Path) -> None:
    path = tmp_path / NGRAMS
    table.save(path)
    whole = path.read_bytes()
    with refused(CheckpointError, path, "vocabulary", 3):
        load_ngrams(path, 3)
    for damaged in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with refused(CheckpointError, path):
            load_ngrams(path, 4)
    np.savez(path, format=np.array(1), keys=table.keys)
    with refused(CheckpointError, path, "tokens"):
        load_ngrams(path, 4)
    np.savez(path, format=np.array(2), keys=table.keys, tokens=table.tokens, probabilities=table.probabilities)
    with refused(CheckpointError, path, "version"):
        load_ngrams(path, 4)


def test_the_embedded_model_has_a_table() -> None:
    table = find_ngrams(EMBEDDED, None, 49152)
    assert table is not None
    assert len(table) > 100_000


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["autoregressive", "shifted"])
def test_drafts_from_a_table_change_no_text_and_save_forwards(kind: str, temperature: float) -> None:
    shifted = {"mask_id": MASK, "start_id": 0, "block_size": 4} if kind == "shifted" else {}
    model = LanguageModel(tiny_model("llama", **shifted), None, name="tiny")
    prompts, options = [[5, 6, 7], [8, 9]], {"max_new_tokens": 24, "temperature": temperature, "seed": 3}

    def answers(ngrams: NgramTable | None) -> tuple[list[tuple[int, ...]], int]:
        engine = Engine(model.backend(), drafting=DraftStatistics(costs=CostTable(), ngrams=ngrams))
        done = engine.run([model.request(prompt, ignore_eos=True, **options) for prompt in prompts])
        return [each.ids for each in done], sum(each.forwards for each in done)

    texts, forwards = answers(None)
    written = [document([*prompt, *text] * 2) for prompt, text in zip(prompts, texts, strict=True)]
    drafted, fewer = answers(count_ngrams(written))
    assert drafted == texts
    assert fewer < forwards
    wrong = count_ngrams([document([*prompt, *reversed(text)] * 2) for prompt, text in zip(prompts, texts, strict=True)])
    assert answers(wrong)[0] == texts
