"""llama.cpp's /infill, with the bodies that llama.vim sends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asking import HTTP
from live import CONTEXT, Live

from unmask.engine.llm import LanguageModel
from unmask.serve.protocol.llamacpp import LlamaInfillRequest

BODY: dict[str, Any] = {
    "input_prefix": "def add(a, b):\n    ",
    "input_suffix": "\n\nprint(add(1, 2))\n",
    "input_extra": [{"filename": "other.py", "text": "def sub(a, b):\n    return a - b\n", "time": [12, 3]}],
    "prompt": "return ",
    "n_predict": 8,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "seed": 7,
    "temperature": 1.0,
}


def ask(site: Live, **changes: Any) -> Any:
    return HTTP.post(f"{site.url}/infill", json={**BODY, **changes})


def test_the_likeliest_of_several_lengths_is_given(site: Live, tiny: LanguageModel) -> None:
    got = ask(site)
    assert got.status_code == 200
    assert "x-unmask-ignored-fields" not in got.headers
    answer = got.json()
    filled = {}
    for tokens in (4, 8):
        body = {
            "model": "tiny",
            "prompt": "other.py\n" + BODY["input_extra"][0]["text"] + "\n\n" + BODY["input_prefix"] + "return ",
        }
        body |= {name: BODY[name] for name in ("top_k", "top_p", "seed", "temperature")}
        body |= {"suffix": BODY["input_suffix"], "max_tokens": tokens, "logprobs": 0}
        (choice,) = HTTP.post(f"{site.url}/v1/completions", json=body).json()["choices"]
        logprobs = choice["logprobs"]["token_logprobs"]
        filled[sum(logprobs) / len(logprobs)] = choice["text"]
    assert answer["content"] == filled[max(filled)]
    assert answer["stop"]
    assert answer["tokens_predicted"] in (4, 8)
    assert answer["timings"]["predicted_n"] == answer["tokens_predicted"]
    lines = [json.loads(line.removeprefix("data: ")) for line in ask(site, stream=True).text.splitlines() if line]
    assert "".join(line["content"] for line in lines) == answer["content"]
    assert [line["stop"] for line in lines] == [False, True]


def test_fields_of_the_response_are_selected_by_path(site: Live) -> None:
    assert set(ask(site, response_fields=["content", "timings/predicted_n", "nothing"]).json()) == {
        "content",
        "timings/predicted_n",
    }


def test_without_a_suffix_the_text_is_continued(site: Live, tiny: LanguageModel) -> None:
    got = ask(site, input_suffix="", input_extra=[], prompt="", temperature=0.0, n_predict=6).json()
    assert tiny.tokenizer is not None
    ids = tiny.encode_prompt(BODY["input_prefix"], chat=False)
    assert got["content"] == tiny.tokenizer.decode(tiny.generate_ids(ids, max_new_tokens=6, temperature=0.0))
    assert got["stop_type"] == "limit"


@pytest.mark.parametrize(
    "changes", [{"n_predict": 0}, {"input_prefix": "", "input_suffix": "", "input_extra": [], "prompt": ""}]
)
def test_nothing_is_filled_where_nothing_is_asked_for(site: Live, changes: dict[str, Any]) -> None:
    assert ask(site, **changes).json()["content"] == ""


def test_a_long_prefix_loses_its_beginning(site: Live) -> None:
    assert len(ask(site, input_prefix="x y " * 2000).json()["content"]) > 0


def test_a_long_suffix_leaves_room_for_the_prefix(site: Live) -> None:
    """Its end is left out, so that a quarter of the context stands before the hole."""
    found = ask(site, input_prefix="x y " * 2000, input_suffix=" z" * 2000, input_extra=[], prompt="", n_predict=4).json()
    assert found["tokens_evaluated"] == CONTEXT - 4


def test_seed_0_is_a_seed_and_a_negative_one_is_none() -> None:
    seeds = [LlamaInfillRequest(input_prefix="a", seed=seed).to_completion("tiny", [1], 4).seed for seed in (0, -1, None)]
    assert seeds == [0, None, None]


def test_a_continued_text_begins_with_the_tokenizers_prefix(
    site: Live, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny.tokenizer is not None
    monkeypatch.setattr(tiny.tokenizer, "_prefix_ids", (5,))
    changes = {"input_suffix": "", "input_extra": [], "prompt": "", "temperature": 0.0, "n_predict": 6}
    ids = tiny.encode_prompt(BODY["input_prefix"], chat=False)
    assert ids[0] == 5
    assert ask(site, **changes).json()["content"] == tiny.tokenizer.decode(
        tiny.generate_ids(ids, max_new_tokens=6, temperature=0.0), after=ids
    )
