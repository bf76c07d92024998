"""`LanguageModel` on token ids: which decoder it picks, its defaults, its logits, and every refusal in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers import refused
from tiny import FAMILIES, MASK, VOCAB, tiny_model
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sampling_params import BLOCK_SIZE, PRESETS, ResolvedParams
from unmask.errors import RequestError, UnmaskWarning
from unmask.models.arch.attention import DenseAttend

IDS = (5, 17, 3, 40, 8, 22, 9)


def diffusion(family: str = "llama", **changes: Any) -> LanguageModel:
    options: dict[str, Any] = {"mask_id": MASK, "block_size": 4, "token_editing": True} | changes
    return LanguageModel(tiny_model(family, 1, **options), None, name="tiny")


def autoregressive(family: str = "llama", **changes: Any) -> LanguageModel:
    return LanguageModel(tiny_model(family, 1, **changes), None, name="tiny-ar")


def oracle(model: LanguageModel, max_new_tokens: int, rules: ResolvedParams, *eos: int, mask: int = MASK) -> list[int]:
    return list(
        generate_reference(
            model.transformer, Request(IDS, rules.replace(max_new_tokens=max_new_tokens), frozenset(eos)), mask
        ).ids
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_a_mask_token_denoises(family: str) -> None:
    model = diffusion(family)
    assert model.is_diffusion
    rules = ResolvedParams(block_size=4, threshold=0.95, steps=4)
    assert model.generate_ids(IDS, max_new_tokens=10) == oracle(model, 10, rules)
    assert model.generate_ids(list(IDS), max_new_tokens=10) == oracle(model, 10, rules)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_one_predicts_the_next_token(family: str) -> None:
    model = autoregressive(family)
    assert not model.is_diffusion
    (expected,) = Engine(model.transformer).run([Request(IDS, ResolvedParams(max_new_tokens=10))])
    assert model.complete(IDS, max_new_tokens=10) == expected
    assert model.generate_ids(IDS, max_new_tokens=10) == list(expected.ids)


def test_every_option_reaches_the_decoder() -> None:
    model = diffusion("qwen3")
    options: dict[str, Any] = {"threshold": 0.1, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 5}
    found = model.generate_ids(IDS, max_new_tokens=12, block_size=8, steps=6, **options)
    assert found == oracle(model, 12, ResolvedParams(block_size=8, steps=6, **options))
    for change in ({"temperature": 0.0}, {"top_k": 1}, {"seed": 6}, {"block_size": 2}, {"steps": 1}, {"threshold": 1.0}):
        altered = {"block_size": 8, "steps": 6, **options} | change
        assert model.generate_ids(IDS, max_new_tokens=12, **altered) != found, f"{change} changed nothing"


def test_top_p_reaches_the_decoder() -> None:
    model = diffusion("llama")
    greedy = model.generate_ids(IDS, max_new_tokens=8, threshold=1.0)
    narrow = model.generate_ids(IDS, max_new_tokens=8, threshold=1.0, temperature=1.0, top_p=1e-6, seed=3)
    wide = model.generate_ids(IDS, max_new_tokens=8, threshold=1.0, temperature=1.0, seed=3)
    assert wide not in (narrow, greedy)
    assert narrow == oracle(model, 8, ResolvedParams(block_size=4, threshold=1.0, steps=4, temperature=1.0, top_p=1e-6, seed=3))


@pytest.mark.parametrize("size", [8, 40])
def test_steps_follow_a_given_block_size(size: int) -> None:
    model = diffusion()
    expected = oracle(model, 10, ResolvedParams(block_size=size, threshold=1.0, steps=size))
    assert model.generate_ids(IDS, max_new_tokens=10, block_size=size, threshold=1.0) == expected
    assert model.complete(IDS, max_new_tokens=33, block_size=40, threshold=1.0).forwards == 33, "one token per pass"


def test_an_autoregressive_model_denoises_when_given_a_mask() -> None:
    model = autoregressive()
    expected = oracle(model, 8, ResolvedParams(block_size=4, steps=4), mask=50)
    assert model.generate_ids(IDS, max_new_tokens=8, mask_id=50, block_size=4) == expected
    steps: list[DecodingStep] = []
    model.complete(IDS, max_new_tokens=8, mask_id=50, on_step=steps.append)
    assert {len(step.tokens) for step in steps} == {BLOCK_SIZE}


@pytest.mark.parametrize("make", [diffusion, autoregressive])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.01}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.01}, {"temperature": 1e-300}],
    ids=str,
)
def test_sampling_that_is_nearly_greedy_takes_the_steps_of_greedy_decoding(
    make: Callable[[], LanguageModel], options: dict[str, float]
) -> None:
    model = make()
    rules = {"max_new_tokens": 24, "block_size": 8, "threshold": 0.3, "trace": True}
    for policy in ("threshold", "entropy", "fixed"):
        expected = model.complete(IDS, **rules, policy=policy)
        found = model.complete(IDS, **rules, policy=policy, seed=5, **options)
        assert (found, [step.accepted for step in found.trace]) == (expected, [step.accepted for step in expected.trace])
        assert policy != "threshold" or make is autoregressive or 1 < expected.forwards < 24


def test_ends_come_from_the_call_or_the_config() -> None:
    endless = diffusion().generate_ids(IDS, max_new_tokens=12)
    end = endless[6]
    cut = endless[: endless.index(end) + 1]
    model = diffusion(eos_ids=(end,))
    assert model.generate_ids(IDS, max_new_tokens=12) == cut
    assert model.generate_ids(IDS, max_new_tokens=12, eos_id=VOCAB - 1) == endless
    assert model.generate_ids(IDS, max_new_tokens=12, eos_id=[]) == endless
    assert diffusion().generate_ids(IDS, max_new_tokens=12, eos_id=end) == cut
    assert diffusion().generate_ids(IDS, max_new_tokens=12, eos_id=[VOCAB - 1, end]) == cut
    completion = model.complete(IDS, max_new_tokens=12)
    assert (completion.finish_reason, list(completion.ids)) == ("stop", cut)


@pytest.mark.parametrize("make", [diffusion, autoregressive])
def test_completions_report_their_steps(make: Callable[[], LanguageModel]) -> None:
    model, steps = make(), list[DecodingStep]()
    completion = model.complete(IDS, max_new_tokens=6, on_step=steps.append)
    assert isinstance(completion, Completion)
    assert steps[-1].forwards == completion.forwards
    assert model.complete(IDS, max_new_tokens=6) == completion, "calls keep no state"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [None, 1, 3, 100])
def test_logits_see_their_own_block_and_those_before_it(family: str, block_size: int | None) -> None:
    model, size = diffusion(family), block_size or 4
    ids = [*IDS[:5], MASK, IDS[6], MASK]
    allowed = torch.tensor([[k // size <= q // size for k in range(8)] for q in range(8)])
    with torch.no_grad():
        hidden = model.transformer(torch.tensor([ids]), torch.arange(8)[None], DenseAttend(allowed[None]))
        expected = model.transformer.head(hidden)[0]
    found = model.logits(ids, block_size=block_size)
    assert found.shape == (8, VOCAB)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_logits_of_an_autoregressive_model_are_causal() -> None:
    model = autoregressive()
    found = model.logits(IDS)
    for length in range(1, len(IDS)):
        torch.testing.assert_close(model.logits(IDS[:length]), found[:length], atol=1e-4, rtol=1e-4)
    (following,) = model.generate_ids(IDS, max_new_tokens=1)
    assert int(found[-1].argmax()) == following
    assert not torch.allclose(model.logits(IDS, block_size=4)[0], found[0])


def test_logits_are_float32_in_a_bfloat16_model() -> None:
    model = LanguageModel(tiny_model("llama", 1, torch.bfloat16, mask_id=MASK, block_size=4), None, name="tiny")
    assert model.logits(IDS).dtype == torch.float32
    assert len(model.generate_ids(IDS, max_new_tokens=5)) == 5


@pytest.mark.parametrize("make", [diffusion, autoregressive])
def test_the_whole_context_can_be_used(make: Callable[..., LanguageModel]) -> None:
    model = make(max_positions=8)
    assert len(model.generate_ids(IDS, max_new_tokens=1)) == 1
    assert model.logits([*IDS, 1]).shape == (8, VOCAB)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 122}, "context"),
        ({"mask_id": VOCAB}, "mask token"),
        ({"mask_id": -1}, "mask token"),
        ({"threshold": 1.2}, "threshold"),
        ({"threshold": -1.0}, "threshold"),
        ({"block_size": 0}, "block_size"),
        ({"steps": 0}, "steps"),
        ({"temperature": -0.5}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
@pytest.mark.parametrize("make", [diffusion, autoregressive])
def test_options_out_of_range_are_refused(make: Callable[[], LanguageModel], options: dict[str, Any], name: str) -> None:
    with refused(RequestError, name, *options.values()):
        make().generate_ids(IDS, **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    for call in (lambda: diffusion().generate_ids([3, token]), lambda: diffusion().logits([3, token])):
        with refused(RequestError, "prompt token", token):
            call()


def test_what_cannot_be_done_is_refused_in_one_line() -> None:
    model = diffusion()
    calls: list[tuple[tuple[object, ...], Callable[[], object]]] = [
        (("tokenizer", "generate_ids"), lambda: model.generate("hello")),
        (("tokenizer", "generate_ids"), lambda: model.encode_prompt("hello")),
        (("logits", 0), lambda: model.logits([])),
        (("block_size", 0), lambda: model.logits(IDS, block_size=0)),
        (("autoregressive", "prompt token"), lambda: autoregressive().generate_ids([], max_new_tokens=4)),
    ]
    for names, call in calls:
        with refused(RequestError, *names):
            call()


def test_an_empty_prompt_is_enough_for_diffusion() -> None:
    model = diffusion()
    expected = generate_reference(
        model.transformer, Request((), ResolvedParams(block_size=4, threshold=0.95, steps=4, max_new_tokens=9)), MASK
    )
    assert model.generate_ids([], max_new_tokens=9) == list(expected.ids)


def test_edits_of_a_model_not_trained_for_them_are_warned_of_or_refused() -> None:
    with pytest.warns(UnmaskWarning, match="token_editing"):
        diffusion(token_editing=False).request(IDS, preset="speed")
    with refused(RequestError, "edit_threshold", "diffusion model"):
        autoregressive().complete(IDS, edit_threshold=0.5, max_new_tokens=4)


def test_editing_options_reach_the_decoder() -> None:
    model = diffusion("qwen3")
    changes: dict[str, Any] = {"threshold": 0.3, "edit_threshold": 0.1, "max_post_steps": 3, "window": 2}
    found = model.generate_ids(IDS, max_new_tokens=12, **changes)
    assert found == oracle(model, 12, ResolvedParams(block_size=4, steps=4, **changes))
    assert found != model.generate_ids(IDS, max_new_tokens=12, threshold=0.3)
    forwards = {n: model.complete(IDS, max_new_tokens=12, **(changes | {"max_post_steps": n})).forwards for n in (0, 3)}
    assert forwards[0] < forwards[3]


@pytest.mark.parametrize("preset", ["speed", "quality"])
def test_presets_are_shorthands_that_options_override(preset: str) -> None:
    model = diffusion()
    rules = model.request(IDS, preset=preset).params
    assert rules == ResolvedParams(block_size=4, steps=4, **PRESETS[preset])
    assert model.generate_ids(IDS, max_new_tokens=9, preset=preset) == oracle(model, 9, rules)
    assert model.request(IDS, preset=preset, threshold=0.9).params == rules.replace(threshold=0.9)


def test_holes_are_filled_through_the_public_call() -> None:
    model = diffusion()
    ids = (*IDS[:2], None, *IDS[3:], None)
    expected = generate_reference(
        model.transformer, Request(ids, ResolvedParams(block_size=4, steps=4, max_new_tokens=3)), MASK
    ).ids
    assert model.generate_ids(ids, max_new_tokens=3) == list(expected)
    assert len(model.generate_ids(ids, max_new_tokens=0)) == 2


def test_request_options_reach_the_engine() -> None:
    model = diffusion()
    free = model.generate_ids(IDS, max_new_tokens=8)
    request = model.request(IDS, max_new_tokens=8, min_new_tokens=3, logit_bias={free[0]: float("-inf")}, sample=2, priority=-1)
    assert (request.params.min_new_tokens, request.sample, request.priority) == (3, 2, -1)
    assert free[0] not in model.generate_ids(IDS, max_new_tokens=8, logit_bias={free[0]: float("-inf")})
    traced = model.complete(IDS, max_new_tokens=8, trace=True, logprobs=1)
    seen: list[DecodingStep] = []
    model.complete(IDS, max_new_tokens=8, on_step=seen.append)
    assert list(traced.trace) == seen
    assert traced.logprobs is not None
    assert len(traced.logprobs) == 8
    assert model.complete(IDS, max_new_tokens=8).trace == ()


def test_several_requests_share_an_engine() -> None:
    model = diffusion("llada2")
    engine = model.engine(num_tokens=256)
    requests = [model.request(IDS[:n], max_new_tokens=9) for n in (2, 5, 7)]
    assert [list(c.ids) for c in engine.run(requests)] == [model.generate_ids(IDS[:n], max_new_tokens=9) for n in (2, 5, 7)]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"heat": 1.0}, ["heat", "block_size", "edit_threshold"]),
        ({"preset": "fast"}, ["preset", "'fast'", "speed", "quality"]),
        ({"window": 2}, ["window", 2, "edit_threshold"]),
        ({"policy": "best"}, ["policy", "'best'", "threshold", "entropy", "fixed"]),
        ({"regex": "a", "json_schema": {}}, ["json_schema", "regex"]),
        ({"stop": "x"}, ["stop", "tokenizer"]),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], names: list[object]) -> None:
    with refused(RequestError, *names):
        diffusion().generate_ids(IDS, max_new_tokens=4, **options)
