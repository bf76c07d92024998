"""Decoding in slots writes what the engine writes."""

from __future__ import annotations

import pytest
from graph_decoder import GraphDecoder

import unmask
from runs import tiny_folder
from unmask.engine.llm import LanguageModel

BUDGETS = (5, 9, 1, 20, 7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return unmask.load(tiny_folder(tmp_path_factory.mktemp("model")), quantize="none")


def decode(decoder: GraphDecoder, prompts: list[list[int]], temperature: float) -> list[list[int]]:
    waiting = list(zip(prompts, BUDGETS, strict=True))
    numbers, found = [], {}
    while waiting or len(found) < len(numbers):
        while waiting and decoder.room > 0:
            ids, budget = waiting.pop(0)
            numbers.append(decoder.add(ids, budget=budget, temperature=temperature, seed=0))
        for decoded in decoder.step():
            found[decoded.number] = decoded.ids
            assert decoded.ended == (decoded.ids[-1] in decoder.end_ids)
    return [found[number] for number in numbers]


def test_slots_decode_greedily_what_the_engine_decodes(model: LanguageModel) -> None:
    prompts = [[(7 * number + step) % 40 + 5 for step in range(3 + number)] for number in range(len(BUDGETS))]
    decoder = GraphDecoder(model.transformer, model.eos_ids, num_slots=2, max_length=32)
    found = decode(decoder, prompts, temperature=0.0)
    for ids, budget, decoded in zip(prompts, BUDGETS, found, strict=True):
        assert decoded == list(model.complete(ids, max_new_tokens=budget, temperature=0.0).ids)


def test_sampling_varies_and_a_budget_is_cut_to_the_slot(model: LanguageModel) -> None:
    prompts = [[5, 6, 7]] * len(BUDGETS)
    decoder = GraphDecoder(model.transformer, (), num_slots=3, max_length=12)
    found = decode(decoder, prompts, temperature=3.0)
    assert [len(ids) for ids in found] == [min(budget, 9) for budget in BUDGETS]
    assert found[1] != found[3]


def test_a_prompt_without_room_for_an_answer_is_refused(model: LanguageModel) -> None:
    decoder = GraphDecoder(model.transformer, (), num_slots=1, max_length=4)
    with pytest.raises(ValueError, match="holds 1 to 3"):
        decoder.add([1, 2, 3, 4], budget=1, temperature=0.0, seed=0)
