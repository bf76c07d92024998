"""Shifted models in training: the token before is read at every position, and a block of one token is the parent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.test_equivalence import CONFIGS, nll, of_stream, rows_to_score
from diffusion.test_stream import configs, names, packed, tokens_of
from tiny import MASK, Rows, pack, text, tiny_model
from unmask.diffusion.corrupt import (
    CorruptionConfig,
    NoisyCopy,
    block_ids,
    build_stream,
    corrupt,
    next_token_stream,
    noisy_copies,
)
from unmask.diffusion.masks import CLEAN
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer

START = 1
DOCUMENTS = [text(11, 0, prompt=5), text(9, 1)]
SHIFTED = {family: tiny_model(family, 3, torch.float64, mask_id=MASK, start_id=START) for family in ("llama", "llada2")}


@given(packed(), configs, st.integers(0, 20))
def test_every_position_reads_the_token_before(rows: Rows, config: CorruptionConfig, seed: int) -> None:
    """The noisy one inside a block, the clean one before it, the start token before a document; all else is as without."""
    copies = noisy_copies(rows, config, seed)
    plain, shifted = (build_stream(rows, copies, replace(config, start_id=start)) for start in (None, START))
    source, block_RL = tokens_of(rows), block_ids(rows.position_RL, config.block_size)
    for (copy, row, document, position), at in names(shifted).items():
        if position == 0:
            assert int(shifted.tokens_BT[at]) == START
            continue
        origin, here = source[row, document, position - 1], source[row, document, position]
        inside = copy != CLEAN and bool(block_RL[origin] == block_RL[here])
        masked = inside and bool(copies[copy - 1].masked_RL[origin])
        assert int(shifted.tokens_BT[at]) == (MASK if masked else int(rows.tokens_RL[origin]))
    assert all(torch.equal(a, b) for a, b in zip(plain.predict, shifted.predict, strict=True))
    for name in ("target_N", "weight_N", "t_N", "position_BT"):
        assert torch.equal(getattr(plain, name), getattr(shifted, name))


@torch.no_grad()
def of_single_blocks(model: Transformer, rows: Rows, copies: list[NoisyCopy], size: int) -> dict[tuple[int, ...], float]:
    """One forward per block over the text so far, as at inference, written with lists."""
    found: dict[tuple[int, ...], float] = {}
    for number, copy in enumerate(copies, start=1):
        for identity, at, row in rows.places():
            tokens, masked = rows.tokens_RL[row, at].tolist(), copy.masked_RL[row, at].tolist()
            for start in range(0, len(tokens), size):
                block = range(start, min(start + size, len(tokens)))
                places = [p for p in block if masked[p]]
                if not places:
                    continue
                canvas = [START, *tokens[:start], *(MASK if masked[p] else tokens[p] for p in block)][:-1]
                allowed = torch.ones(len(canvas), len(canvas), dtype=torch.bool)
                allowed[:start] = allowed.tril()[:start]
                attend = DenseAttend(allowed[None])
                hidden = model(torch.tensor(canvas)[None], torch.arange(len(canvas))[None], attend)[0, places]
                values = nll(model, hidden, torch.tensor([tokens[p] for p in places])).tolist()
                found |= {(*identity, number, p): value for p, value in zip(places, values, strict=True)}
    return found


@pytest.mark.parametrize("family", SHIFTED)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_size}-{c.num_copies}-{c.sampling}")
def test_training_predicts_what_decoding_would(family: str, config: CorruptionConfig) -> None:
    model, rows = SHIFTED[family], rows_to_score()
    copies = noisy_copies(rows, config, 5)
    assert config.block_size is not None
    expected = of_single_blocks(model, rows, copies, config.block_size)
    for blocked in (False, True):
        found = of_stream(model, build_stream(rows, copies, replace(config, start_id=START)), blocked=blocked)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("family", SHIFTED)
def test_a_block_of_one_is_the_autoregressive_parent(family: str) -> None:
    """Prediction by prediction: the parent reads the start token and then the same documents."""
    shifted = corrupt(pack([DOCUMENTS], 23), CorruptionConfig(MASK, 1, start_id=START), 0)
    found, expected = of_stream(SHIFTED[family], shifted), of_parent(SHIFTED[family])
    assert list(found.values()) == pytest.approx(expected, abs=1e-9)
    assert len(found) == 15


def of_parent(model: Transformer) -> list[float]:
    """Next-token losses of the documents, each behind a start token."""
    with_start = [replace(each, tokens=(START, *each.tokens), maskable=(False, *each.maskable)) for each in DOCUMENTS]
    return list(of_stream(model, next_token_stream(pack([with_start], 23))).values())
