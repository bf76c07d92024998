"""The lm-eval adapter with that library's own runner, on tasks made of local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from helpers import make_tokenizer, refused
from tiny import tiny_model
from unmask.engine.llm import LanguageModel
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError, RequestError
from unmask.eval.harness import HarnessLM, run_harness
from unmask.eval.likelihood import LikelihoodEstimator

ACCURACY = {"metric": "acc"}
NONE = TaskManager(include_defaults=False)
"""No tasks but those of this file: reading all of lm-eval's takes ten seconds."""
DOCS = [
    {"question": f"What is {i} + {i + 1}?", "choices": [f"{2 * i}", f"{2 * i + 1}", f"{2 * i + 2} and so on"], "gold": 1}
    for i in range(6)
]


def model_of(folder: Path, block_size: int | None) -> LanguageModel:
    tokenizer = make_tokenizer(folder, mask_token=None if block_size is None else "<file_sep>")
    special = {} if block_size is None else {"mask_id": tokenizer.mask_id, "block_size": block_size}
    transformer = tiny_model(
        "llama", vocab_size=tokenizer.vocab_size, max_positions=256, eos_ids=(tokenizer.eos_id,), **special
    )
    return LanguageModel(transformer, tokenizer, name="tiny")


@pytest.fixture(scope="module", params=[None, 1, 8], ids=["autoregressive", "block 1", "block 8"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return model_of(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "docs.jsonl"
    path.write_text("\n".join(json.dumps(doc) for doc in DOCS))
    return str(path)


def task(data: str, **settings: Any) -> dict[str, Any]:
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "gold",
    }
    return {**common, **settings}


def test_multiple_choice_is_by_likelihood(model: LanguageModel, data: str) -> None:
    settings = task(data, task="choice", output_type="multiple_choice", doc_to_choice="choices", metric_list=[ACCURACY])
    lm = HarnessLM(model, samples=4, seed=3)
    results = simple_evaluate(lm, tasks=[settings], log_samples=True, bootstrap_iters=0, task_manager=NONE)
    estimator, tokenizer = LikelihoodEstimator(model, samples=4, seed=3), model.tokenizer
    right = 0
    for doc in DOCS:
        text = f"Question: {doc['question']}\nAnswer:"
        values = []
        for choice in doc["choices"]:
            whole, context = tokenizer.encode(f"{text} {choice}"), tokenizer.encode(text)
            values.append(estimator.score(context, whole[len(context) :]).value)
        right += values.index(max(values)) == doc["gold"]
    assert results["results"]["choice"]["acc,none"] == pytest.approx(right / len(DOCS))
    assert len(lm.scored) == 18
    assert all(each.exact for each in lm.scored) == (model.config.block_size in (None, 1))


def test_answers_are_the_engines(model: LanguageModel, data: str) -> None:
    settings = task(
        data,
        task="answers",
        output_type="generate_until",
        doc_to_target="{{choices[gold]}}",
        generation_kwargs={"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    lm = HarnessLM(model, batch=4, decoding=SamplingParams(threshold=None if model.config.mask_id is None else 0.5))
    results = simple_evaluate(lm, tasks=[settings], log_samples=True, bootstrap_iters=0, task_manager=NONE)
    options: dict[str, Any] = {} if model.config.mask_id is None else {"threshold": 0.5}
    for doc, sample in zip(DOCS, results["samples"]["answers"], strict=True):
        prompt = f"Question: {doc['question']}\nAnswer:"
        alone = model.generate(prompt, chat=False, max_new_tokens=12, stop=["\n", "."], **options)
        assert sample["resps"] == [[alone.text]]
    assert sum(len(each.ids) for each in lm.completions) > 0
    assert all(each.forwards > 0 for each in lm.completions)


def test_whole_texts_are_scored_in_windows(model: LanguageModel) -> None:
    lm = HarnessLM(model, samples=2)
    short, long = "The quick brown fox.", "The answer is 5. " * 100
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (short, long)]
    found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    ids = model.tokenizer.encode(short)
    own = LikelihoodEstimator(model, samples=2).score([model.tokenizer.eos_id], ids)
    assert found[0] == pytest.approx(own.value)
    assert sum(each.tokens for each in lm.scored) == len(ids) + len(model.tokenizer.encode(long))


def test_greedy_continuations_are_known(model: LanguageModel) -> None:
    context = "What is 2 + 3?"
    ids = model.generate_ids(model.tokenizer.encode(context), max_new_tokens=9)
    pairs = [(("", ""), model.tokenizer.encode(context), ids), (("", ""), model.tokenizer.encode(context), [*ids[:-1], 9])]
    if ids[-1] == 9:
        pairs.pop()
    answers = HarnessLM(model, samples=2)._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False][: len(pairs)]


def test_conversations_go_through_the_chat_template(model: LanguageModel, data: str) -> None:
    settings = task(
        data,
        task="chat",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{choices[gold]}}",
        generation_kwargs={"until": [], "max_gen_toks": 6},
        metric_list=[{"metric": "exact_match"}],
    )
    results = simple_evaluate(
        HarnessLM(model), tasks=[settings], apply_chat_template=True, bootstrap_iters=0, limit=2, task_manager=NONE
    )
    for doc, sample in zip(DOCS, results["samples"]["chat"], strict=False):
        assert sample["resps"] == [[model.generate(doc["question"], max_new_tokens=6).text]]


def test_an_answer_that_is_begun_goes_on(model: LanguageModel) -> None:
    """As lm-eval's `gen_prefix` asks for it: the assistant's turn stays open."""
    lm = HarnessLM(model)
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "The answer"}]
    whole = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert whole == lm.apply_chat_template(turns[:1]) + "The answer"
    assert model.tokenizer.eos_id not in lm.tok_encode(whole)[-3:]


def test_contexts_that_do_not_fit_lose_their_beginning(model: LanguageModel) -> None:
    lm = HarnessLM(model, samples=2)
    texts = lm.generate_until([Instance("generate_until", {}, ("word " * 400, {"max_gen_toks": 4}), 0)], disable_tqdm=True)
    assert len(texts) == 1
    assert lm.truncated == 1
    lm._loglikelihood_tokens([(("", ""), [5] * 300, [6, 7])], disable_tqdm=True)
    assert lm.truncated == 2
    with refused(RequestError, 300):
        lm._loglikelihood_tokens([(("", ""), [5], [6] * 300)], disable_tqdm=True)


def test_what_a_task_asks_for_and_we_do_not_know_is_an_error(model: LanguageModel) -> None:
    with refused(ConfigError, "num_beams"):
        HarnessLM(model).generate_until([Instance("generate_until", {}, ("a", {"num_beams": 4}), 0)], disable_tqdm=True)


def test_a_run_writes_what_it_found(model: LanguageModel, data: str, tmp_path: Path) -> None:
    settings = task(data, task="choice", output_type="multiple_choice", doc_to_choice="choices", metric_list=[ACCURACY])
    found = run_harness(model, [settings], tmp_path, limit=3, chat=False, samples=2, manager=NONE)  # type: ignore[list-item]
    assert json.loads((tmp_path / "harness.json").read_text()) == found
    assert found["limit"] == 3
    assert found["n-samples"]["choice"]["effective"] == 3
    exact = model.config.block_size in (None, 1)
    assert found["likelihood"]["kind"] == ("exact" if exact else "lower bound (-NELBO)")
    assert (found["likelihood"]["mean_standard_error"] > 0) == (not exact)
    lines = (tmp_path / "harness_samples.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert run_harness(model, [settings], tmp_path, limit=3, chat=False, samples=2, manager=NONE)["likelihood"] is None, (
        "all from the cache"
    )


@pytest.mark.parametrize("change", ["quantize", "decoding"])
def test_answers_are_not_taken_from_a_run_with_other_weights_or_options(data: str, tmp_path: Path, change: str) -> None:
    settings = task(data, task="choice", output_type="multiple_choice", doc_to_choice="choices", metric_list=[ACCURACY])
    model = model_of(tmp_path / "model", 8)
    options: dict[str, Any] = {
        "limit": 1,
        "chat": False,
        "samples": 2,
        "decoding": SamplingParams(threshold=0.9),
        "manager": NONE,
    }
    run_harness(model, [settings], tmp_path, **options)  # type: ignore[list-item]
    if change == "quantize":
        model.quantize = "int8"
    else:
        options |= (
            {"decoding": SamplingParams(threshold=0.5)} if change == "decoding" else {"samples": 3, "chat": change == "chat"}
        )
    with refused(ConfigError, "another folder"):
        run_harness(model, [settings], tmp_path, **options)  # type: ignore[list-item]
    (tmp_path / "harness.json").unlink()  # of a run that was killed there is only the cache
    found = run_harness(model, [settings], tmp_path, **options)  # type: ignore[list-item]
    assert found["likelihood"] is not None, "nothing is from the cache"


def test_an_unknown_task_is_told(model: LanguageModel, tmp_path: Path) -> None:
    with refused(ConfigError, "no_such_task"):
        run_harness(model, ["no_such_task"], tmp_path, limit=1, chat=False, manager=NONE)
