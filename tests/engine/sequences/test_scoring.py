"""Log-probabilities of prompts: equal to a plain computation, whatever is cached, however the prompt is cut into forwards."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import make_tokenizer, refused
from tiny import MASK, prompt_of, tiny_model, with_params
from unmask.diffusion.masks import block_causal_mask
from unmask.diffusion.objectives import ban_mask
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import RequestError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer

KINDS = ("autoregressive", "shifted", "diffusion")
SIZE = 4


@cache
def model_of(kind: str) -> Transformer:
    model = tiny_model("qwen3", 5, torch.float64)
    diffusion = {} if kind == "autoregressive" else {"mask_id": MASK, "block_size": SIZE}
    model.config = replace(model.config, **diffusion, **({"start_id": 1} if kind == "shifted" else {}))
    return model


def dense_logits(model: Transformer, ids: list[int], size: int, *, noisy: bool) -> Tensor:
    positions = torch.arange(len(ids))[None]
    attend = DenseAttend(block_causal_mask(len(ids), len(ids), size)[None])
    read = torch.tensor(model.config.inputs(ids, 0, len(ids)))[None]
    return model.head(model(read, positions, attend, noisy_BT=torch.full_like(positions, noisy, dtype=torch.bool)))[0]


@torch.inference_mode()
def reference(kind: str, ids: tuple[int, ...]) -> Tensor:
    """log p(x_i | x_<i) over the vocabulary for i = 1 .. T - 1, without cache or batch."""
    model, config = model_of(kind), model_of(kind).config
    if kind == "diffusion":
        stop = -(-len(ids) // SIZE) * SIZE
        rows = []
        for i in range(1, len(ids)):
            canvas = [*ids[:i], *[MASK] * (stop - i)][: (i // SIZE + 1) * SIZE]
            rows.append(dense_logits(model, canvas, SIZE, noisy=True)[i])
        logits_TV = torch.stack(rows)
    else:
        logits_TV = dense_logits(model, list(ids), 1, noisy=False)
        logits_TV = logits_TV[1:] if config.shifted else logits_TV[:-1]
    return ban_mask(logits_TV.float(), config.mask_id).log_softmax(-1)


def engine_of(kind: str, **options: int | bool) -> Engine:
    return Engine(model_of(kind), **{"cache_block_size": 4, "num_tokens": 128, **options})  # type: ignore[arg-type]


def scoring(length: int, max_new_tokens: int = 0, **options: int | float) -> Request:
    params = ResolvedParams(block_size=SIZE, steps=SIZE, threshold=1.0, prompt_logprobs=3)
    return with_params(prompt_of(length, max_new_tokens, rules=params), **options)


@pytest.mark.parametrize("budget", [8, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_plain_computation(kind: str, budget: int) -> None:
    request = scoring(23)
    expected_TV = reference(kind, tuple(token for token in request.ids if token is not None))
    engine = engine_of(kind, max_num_batched_tokens=budget)
    other = replace(request, ids=request.ids[:12] + request.ids[3:9])
    for completion in (*engine.run([request, other]), *engine.run([request])):
        assert completion.ids == ()
        assert completion.finish_reason == "length"
        scores = completion.prompt_logprobs
        assert scores is not None
        assert scores[0] is None
        if len(scores) < 23:
            continue  # of the other prompt, served in the same forwards
        for score, logprobs_V, token in zip(scores[1:], expected_TV, request.ids[1:], strict=True):
            assert score is not None
            assert score.token == token
            assert score.logprob == pytest.approx(float(logprobs_V[score.token]), abs=1e-5)
            best = logprobs_V.topk(3)
            assert [token for token, _ in score.alternatives] == best.indices.tolist()
            assert [value for _, value in score.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)
    engine.pool.check()
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_after_scoring_is_what_is_generated_without(kind: str) -> None:
    engine = engine_of(kind)
    plain, scored = engine.run([scoring(11, 9, prompt_logprobs=None), scoring(11, 9)])  # type: ignore[arg-type]
    assert scored.ids == plain.ids
    assert len(plain.ids) == 9
    assert plain.prompt_logprobs is None
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == 11
    assert scored.forwards > plain.forwards
    assert scored.costs.cached_tokens == 0, "the cache cannot spare what is scored"


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_scoring_goes_on_where_it_was(kind: str) -> None:
    request = scoring(30)
    (whole,) = engine_of(kind).run([request])
    engine = engine_of(kind, max_num_batched_tokens=8)
    number = engine.add(request)
    for _ in range(3):
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    (completion,) = [update.completion for _ in range(99) for update in engine.step() if update.completion is not None]
    assert not engine.has_work
    assert number == 0
    assert completion.prompt_logprobs is not None
    assert whole.prompt_logprobs is not None
    found, expected = (
        [s.logprob for s in each if s is not None] for each in (completion.prompt_logprobs, whole.prompt_logprobs)
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert completion.costs.preemptions == 1


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_texts_of_a_length_sum_to_one(kind: str) -> None:
    """Of the last token, given those before it: the chain rule's factors are distributions."""
    ids = scoring(6).ids
    requests = [replace(scoring(6), ids=(*ids[:5], token)) for token in range(61)]
    completions = engine_of(kind, num_tokens=512).run(requests)
    last = [completion.prompt_logprobs[-1] for completion in completions if completion.prompt_logprobs is not None]
    assert sum(math.exp(score.logprob) for score in last if score is not None) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_has_no_score(kind: str) -> None:
    scored, generated = engine_of(kind).run([scoring(1), scoring(1, 3)])
    assert scored.prompt_logprobs == (None,) == generated.prompt_logprobs
    assert len(scored.ids) == 0
    assert len(generated.ids) == 3


def test_holes_are_refused() -> None:
    with refused(RequestError, "prompt_logprobs", "holes"):
        engine_of("diffusion").add(replace(scoring(4), ids=(3, None, 4)))


@pytest.mark.parametrize("bos", [None, "<repo_name>"])
def test_a_text_is_scored_after_another(tmp_path: Path, bos: str | None) -> None:
    tokenizer = make_tokenizer(tmp_path, bos_token=bos)
    model = LanguageModel(tiny_model("llama", 1, torch.float64, vocab_size=tokenizer.vocab_size), tokenizer, name="tiny")
    whole, text = model.score("The quick brown fox"), " jumps over"
    ids = tokenizer.encode("The quick brown fox")
    assert [score.token for score in whole] == [*tokenizer.prefix_ids, *ids][1:]
    scores = model.score(text, after="The quick brown fox", alternatives=2)
    assert [score.token for score in scores] == tokenizer.encode("The quick brown fox" + text)[len(ids) :]
    logprobs_TV = model.logits(model.encode_prompt("The quick brown fox" + text, chat=False)).log_softmax(-1)
    rows = zip(scores, logprobs_TV[-len(scores) - 1 : -1], strict=True)
    expected = [float(logprobs_V[score.token]) for score, logprobs_V in rows]
    assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-5)
    assert all(len(score.alternatives) == 2 for score in scores)
