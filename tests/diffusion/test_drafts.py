"""Drafts in training are those of self-speculative decoding: the same tokens, attention and positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.test_equivalence import nll
from diffusion.test_stream import packed
from helpers import refused
from tiny import MASK, Rows, pack, text, tiny_model
from unmask.diffusion.drafts import DraftConfig, draft_stream
from unmask.diffusion.masks import CLEAN
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer
from unmask.train.forward import predicted_hidden

START = 1
ROWS = pack([[text(11, 0, prompt=5), text(9, 1)], [text(17, 2, prompt=2), text(3, 3, prompt=3)]], 23)
CONFIGS = [DraftConfig(MASK, START, size, cuts, 0.8) for size, cuts in ((2, 1), (4, 3), (8, 2), (8, 8), (32, 1))]


def gated(family: str, rank: int | None = 3) -> Transformer:
    """Random weights, updates included."""
    return tiny_model(family, 3, torch.float64, mask_id=MASK, start_id=START, block_size=4, gated_lora_rank=rank)


def blocks_of(maskable: list[bool], config: DraftConfig, cut: int) -> list[tuple[int, list[int]]]:
    """Of every block its first maskable position, and those that are drafted behind it; written with lists."""
    begin, shift = 0, cut * config.block_size // config.cuts
    found: dict[tuple[int, int], list[int]] = {}
    for position, learnt in enumerate(maskable):
        if learnt:
            begin = begin if position and maskable[position - 1] else position
            found.setdefault((begin, (position - begin + shift) // config.block_size), []).append(position)
    return [(places[0], places[1:]) for places in found.values() if places[1:]]


def expected_places(rows: Rows, config: DraftConfig) -> dict[tuple[int, ...], float]:
    """(document's epoch and ordinal, cut, position) of every draft, and its weight."""
    found = {}
    for identity, at, row in rows.places():
        for cut in range(config.cuts):
            for first, drafts in blocks_of(rows.maskable_RL[row, at].tolist(), config, cut):
                found |= {(*identity, cut + 1, p): config.decay ** (p - first - 1) for p in drafts}
    return found


@torch.no_grad()
def of_single_blocks(model: Transformer, rows: Rows, config: DraftConfig) -> dict[tuple[int, ...], float]:
    """One forward a block, as in the engine: verify tokens up to the first unknown one, then draft tokens, which read masks."""
    found: dict[tuple[int, ...], float] = {}
    for identity, at, row in rows.places():
        tokens = rows.tokens_RL[row, at].tolist()
        for cut in range(config.cuts):
            for first, drafts in blocks_of(rows.maskable_RL[row, at].tolist(), config, cut):
                canvas = [START, *tokens[:first], *[MASK] * len(drafts)]
                positions = torch.tensor([*range(first + 1), *drafts])
                allowed = torch.ones(len(canvas), len(canvas), dtype=torch.bool)
                allowed[: first + 1] = allowed.tril()[: first + 1]
                open_ = torch.arange(len(canvas)) > first
                hidden = model(torch.tensor(canvas)[None], positions[None], DenseAttend(allowed[None]), noisy_BT=open_[None])
                values = nll(model, hidden[0, first + 1 :], torch.tensor([tokens[p] for p in drafts])).tolist()
                found |= {(*identity, cut + 1, p): value for p, value in zip(drafts, values, strict=True)}
    return found


@given(packed(), st.integers(2, 9), st.data())
def test_what_is_drafted_and_what_it_weighs(rows: Rows, block_size: int, data: st.DataObject) -> None:
    config = DraftConfig(MASK, START, block_size, data.draw(st.integers(1, block_size)), 0.7)
    stream = draft_stream(rows, config)
    index, at = stream.index, stream.predict
    where = zip(
        stream.epoch_BT[at].tolist(), stream.ordinal_BT[at].tolist(), index.copy_BT[at].tolist(),
        stream.position_BT[at].tolist(), strict=True,
    )  # fmt: skip
    found = dict(zip(where, stream.weight_N.tolist(), strict=True))
    assert found == pytest.approx(expected_places(rows, config))
    assert len(found) == stream.num_maskable == len(stream.target_N)
    real = index.document_BT > 0
    assert bool((stream.tokens_BT[real & (index.copy_BT != CLEAN)] == MASK).all())
    assert not bool((stream.tokens_BT[real & (index.copy_BT == CLEAN)] == MASK).any())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_size}-{c.cuts}")
@pytest.mark.parametrize("rank", [3, None])
def test_training_drafts_what_decoding_would(family: str, config: DraftConfig, rank: int | None) -> None:
    """With updates the clean rows run ahead, without a graph; without any the stream is one pass."""
    model = gated(family, rank)
    stream = draft_stream(ROWS, config)
    expected = of_single_blocks(model, ROWS, config)
    for backend in ("dense", "blocked"):
        hidden_ND = predicted_hidden(model, stream, backend)
        found = nll(model, hidden_ND, stream.target_N).tolist()
        at = stream.predict
        columns = (stream.epoch_BT[at], stream.ordinal_BT[at], stream.index.copy_BT[at], stream.position_BT[at])
        where = list(zip(*(column.tolist() for column in columns), strict=True))
        assert dict(zip(where, found, strict=True)) == pytest.approx(expected, abs=1e-9)


def test_every_answer_of_a_conversation_has_blocks_of_its_own() -> None:
    """No draft goes over a user's turn, which decoding reads before it drafts."""
    answer = [False] * 2 + [True] * 3
    doc = replace(text(15, 0), maskable=(*answer, *answer, *answer))
    stream = draft_stream(pack([[doc]], 15), DraftConfig(MASK, START, 8))
    drafts = (stream.copy_N != CLEAN).nonzero()[:, 0]
    assert stream.position_BT[stream.predict][drafts].tolist() == [3, 4, 8, 9, 13, 14]
    assert stream.index.block_BT[stream.predict][drafts].tolist() == [3, 3, 8, 8, 13, 13]


def test_rows_with_nothing_to_draft_predict_nothing() -> None:
    stream = draft_stream(pack([[text(3, 3, prompt=3), text(4, 5, prompt=3)]], 9), DraftConfig(MASK, START, 4, 2))
    assert stream.num_maskable == len(stream.target_N) == 0


@pytest.mark.parametrize(
    ("values", "names"),
    [((1, 1), ("blocks", 2)), ((4, 0), ("cuts", 0)), ((4, 5), ("cuts", 5, 4))],
)
def test_layouts_that_make_no_sense_are_refused(values: tuple[int, int], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        DraftConfig(MASK, START, *values)
