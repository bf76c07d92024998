"""Shifted models in the engine. That all its paths equal the oracle is the conformance suite's; here: what shifting means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny import FAMILIES, MASK, tiny_model
from unmask.diffusion.decode import DecodeRules
from unmask.engine.engine import Engine
from unmask.engine.model import LanguageModel
from unmask.engine.request import Request
from unmask.eval.likelihood import LikelihoodEstimator
from unmask.models.transformer import Transformer

START = 1
PROMPT = (5, 17, 3, 40, 8, 22, 9, 31, 2)
AUTOREGRESSIVE = {family: tiny_model(family, 4, torch.float64) for family in FAMILIES}


def shifted(family: str, block_size: int = 4) -> Transformer:
    """The same weights as a shifted model."""
    model = tiny_model(family, 4, torch.float64)
    model.config = replace(model.config, mask_id=MASK, block_size=block_size, start_id=START)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_one_decode_as_the_parent_does(family: str) -> None:
    """Token by token, in as many forwards; each takes the row of the token before along, to commit it."""
    rules = DecodeRules(block_size=1, steps=1)
    (parent,) = Engine(AUTOREGRESSIVE[family]).run(
        [Request((START, *PROMPT), 20, rules=rules, logit_bias={MASK: float("-inf")})]
    )
    rows: list[int] = []
    model = shifted(family, 1)
    model.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[1]))
    (found,) = Engine(model).run([Request(PROMPT, 20, rules=rules)])
    assert found.ids == parent.ids
    assert found.forwards == parent.forwards
    assert rows == [len(PROMPT) + 1] + [2] * 19


def test_logits_of_blocks_of_one_are_the_parents() -> None:
    model, parent = (LanguageModel(each, None, name="tiny") for each in (shifted("llama"), AUTOREGRESSIVE["llama"]))
    found, expected = model.logits(PROMPT, block_size=1), parent.logits((START, *PROMPT[:-1]))
    torch.testing.assert_close(found, expected)
    other = model.logits((*PROMPT[:-1], 50), block_size=1)
    assert torch.equal(found, other), "no row reads the last id"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_decided_is_cached_as_the_parent_would(family: str) -> None:
    """Keys and values of prompt and finished blocks are the parent's over the same text, whatever the block size."""
    model, parent = shifted(family, 8), AUTOREGRESSIVE[family]
    request = Request(PROMPT, 23, rules=DecodeRules(block_size=8, steps=8, threshold=0.2))
    engine = Engine(model, page_size=8, num_tokens=64)
    (completion,) = engine.run([request])
    text = (START, *PROMPT, *completion.ids)[:24]
    theirs = Engine(parent, page_size=8, num_tokens=64)
    theirs.run([Request(text, 1, rules=DecodeRules(block_size=1, steps=1))])
    stores = [each._runner.store[..., :24, :] for each in (engine, theirs)]
    torch.testing.assert_close(*stores, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("first", [1, 4, 6])
def test_the_bound_of_blocks_of_one_is_the_parents_likelihood(first: int) -> None:
    model, parent = (LanguageModel(each, None, name="tiny") for each in (shifted("qwen3", 1), AUTOREGRESSIVE["qwen3"]))
    found = LikelihoodEstimator(model, samples=2).score(PROMPT[:first], PROMPT[first:])
    # The parent may predict the mask token; the difference is what it gives that one.
    logits_TV = parent.logits((START, *PROMPT[:-1])).double()
    logits_TV[:, MASK] = float("-inf")
    chain = sum(float(logits_TV.log_softmax(-1)[p, PROMPT[p]]) for p in range(first, len(PROMPT)))
    assert found.exact
    assert found.value == pytest.approx(chain, rel=1e-5)
