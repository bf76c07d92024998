"""The layout `[x_t | x_t' | x_0]`: what is in it, where predictions point, and what is left out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny import MASK, Doc, Rows, pack, text
from unmask.diffusion.corrupt import CorruptionConfig, Stream, block_ids, build_stream, corrupt, noisy_copies
from unmask.diffusion.masks import CLEAN

Where = tuple[int, int, int, int]  # copy, row, document of the row, position


@st.composite
def packed(draw: st.DrawFn) -> Rows:
    """One to three rows of documents with any pattern of maskable tokens, padding included; a row may be empty."""
    rows = []
    for row in range(draw(st.integers(1, 3))):
        patterns = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=3))
        documents = []
        for number, pattern in enumerate(patterns):
            ordinal = row * 10 + number
            documents.append(Doc(text(len(pattern), ordinal).tokens, tuple(pattern), ordinal, draw(st.integers(0, 2))))
        rows.append(documents)
    return pack(rows, 28)


configs = st.builds(
    CorruptionConfig,
    mask_id=st.just(MASK),
    block_size=st.sampled_from([None, 1, 2, 3, 5]),
    complementary=st.booleans(),
    sampling=st.sampled_from(["bernoulli", "fixed_count"]),
)


def names(stream: Stream) -> dict[Where, tuple[int, int]]:
    """Where in the stream each token of each copy of each document stands; every one at most once."""
    found: list[tuple[Where, tuple[int, int]]] = []
    for row in range(stream.tokens_BT.shape[0]):
        for column in range(stream.tokens_BT.shape[1]):
            document = int(stream.index.document_BT[row, column])
            if document > 0:
                copy, position = int(stream.index.copy_BT[row, column]), int(stream.position_BT[row, column])
                found.append(((copy, row, document, position), (row, column)))
    assert max(Counter(where for where, _ in found).values(), default=1) == 1
    return dict(found)


def tokens_of(rows: Rows) -> dict[tuple[int, int, int], tuple[int, int]]:
    """Where in the rows each token of each document stands."""
    at = torch.nonzero(rows.segment_RL)
    return {(r, int(rows.segment_RL[r, c]), int(rows.position_RL[r, c])): (r, c) for r, c in at.tolist()}


@given(packed(), configs, st.integers(0, 20))
def test_the_rows_can_be_rebuilt_from_the_stream(rows: Rows, config: CorruptionConfig, seed: int) -> None:
    copies = noisy_copies(rows, config, seed)
    stream = build_stream(rows, copies, config)
    source, block_RL = tokens_of(rows), block_ids(rows.position_RL, config.block_size)
    for (copy, *token), at in names(stream).items():
        origin = source[tuple(token)]
        masked = copy != CLEAN and bool(copies[copy - 1].masked_RL[origin])
        assert int(stream.tokens_BT[at]) == (MASK if masked else int(rows.tokens_RL[origin]))
        assert int(stream.index.block_BT[at]) == int(block_RL[origin])
        assert int(stream.epoch_BT[at]) == int(rows.epoch_RL[origin])
        assert int(stream.ordinal_BT[at]) == int(rows.ordinal_RL[origin])


@given(packed(), configs, st.integers(0, 20))
def test_every_masked_token_is_predicted_once_in_its_own_place(rows: Rows, config: CorruptionConfig, seed: int) -> None:
    copies = noisy_copies(rows, config, seed)
    stream = build_stream(rows, copies, config)
    source = tokens_of(rows)
    where_of = {at: where for where, at in names(stream).items()}
    predicted: list[Where] = []
    for n, at in enumerate(zip(*(part.tolist() for part in stream.predict), strict=True)):
        copy, *token = where_of[at]
        origin = source[tuple(token)]
        predicted.append(where_of[at])
        assert int(stream.tokens_BT[at]) == MASK
        assert int(stream.target_N[n]) == int(rows.tokens_RL[origin])
        assert float(stream.weight_N[n]) == pytest.approx(float(copies[copy - 1].weight_RL[origin]))
        assert float(stream.t_N[n]) == pytest.approx(float(copies[copy - 1].t_RL[origin]))
    masked = {
        (number, *token)
        for number, copy in enumerate(copies, start=1)
        for token, origin in source.items()
        if copy.masked_RL[origin]
    }
    assert len(predicted) == len(masked)
    assert set(predicted) == masked
    assert stream.num_maskable == int(rows.maskable_RL.sum()) * len(copies)
    assert stream.weight_N.dtype == stream.t_N.dtype == torch.float32


@given(packed(), configs)
def test_the_stream_holds_what_predictions_need_and_no_more(rows: Rows, config: CorruptionConfig) -> None:
    stream = corrupt(rows, config, 0)
    block_RL = block_ids(rows.position_RL, config.block_size)
    token_block = {token: int(block_RL[origin]) for token, origin in tokens_of(rows).items()}
    supervised = {
        (row, document, token_block[row, document, position])
        for (row, document, position), origin in tokens_of(rows).items()
        if rows.maskable_RL[origin]
    }
    expected: set[Where] = set()
    for (row, document, position), block in token_block.items():
        if (row, document, block) in supervised:
            expected |= {(copy, row, document, position) for copy in range(1, config.num_copies + 1)}
        later = [b for r, d, b in supervised if (r, d) == (row, document)]
        if config.block_size is not None and block < max(later, default=-1):
            expected.add((CLEAN, row, document, position))
    assert set(names(stream)) == expected


@given(packed(), configs)
def test_padding_belongs_to_no_document(rows: Rows, config: CorruptionConfig) -> None:
    stream = corrupt(rows, config, 0)
    padding = stream.index.document_BT == 0
    for values in (stream.position_BT, stream.index.block_BT, stream.epoch_BT, stream.ordinal_BT):
        assert not values[padding].any()
    assert not padding[stream.predict].any()


@pytest.mark.parametrize(("complementary", "copies"), [(False, 1), (True, 2)])
def test_widths(complementary: bool, copies: int) -> None:
    rows = pack([[text(12, 0, prompt=5)]], 12)
    stream = corrupt(rows, CorruptionConfig(MASK, 4, complementary=complementary), 0)
    assert stream.tokens_BT.shape == (1, copies * 8 + 8), "the prompt's own block and the last clean one are left out"
    whole = corrupt(rows, CorruptionConfig(MASK, None, complementary=complementary), 0)
    assert whole.tokens_BT.shape == (1, copies * 12), "full-sequence diffusion has no clean copy"


def test_prompt_tokens_that_share_a_block_with_the_answer_stay_visible() -> None:
    rows = pack([[text(8, 0, prompt=6)]], 8)
    stream = corrupt(rows, CorruptionConfig(MASK, 4, sampling="fixed_count", complementary=True), 0)
    for copy in (1, 2):
        block = stream.tokens_BT[0, stream.index.copy_BT[0] == copy]
        assert block[:2].tolist() == rows.tokens_RL[0, 4:6].tolist()


def test_corrupt_is_the_two_steps_in_one() -> None:
    rows, config = pack([[text(9, 0), text(4, 1)]], 14), CorruptionConfig(MASK, 4)
    once, twice = corrupt(rows, config, 3), build_stream(rows, noisy_copies(rows, config, 3), config)
    assert torch.equal(once.tokens_BT, twice.tokens_BT)
    assert torch.equal(once.weight_N, twice.weight_N)
    assert not torch.equal(once.tokens_BT, corrupt(rows, config, 4).tokens_BT)
