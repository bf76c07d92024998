"""Offline IFEval: all of Google's prompts, scored by lm-eval's rules and by nothing else."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from helpers import refused
from unmask.errors import ConfigError
from unmask.eval import ifeval
from unmask.eval.ifeval import IFEVAL, prompts
from unmask.eval.sentences import NOTE
from unmask.eval.task import Item


@pytest.fixture(autouse=True, scope="module")
def rules() -> Any:
    """lm-eval's module."""
    try:
        IFEVAL.items("test", 1)
    except ConfigError as error:
        pytest.skip(str(error))
    return ifeval.load_rules()[0]


def item(key: int) -> Item:
    return next(each for each in IFEVAL.items("test", 541) if each.id == f"ifeval/{key}")


def test_all_prompts_are_there(rules: Any) -> None:
    items = IFEVAL.items("test", 1000)
    assert (len(items), len({each.id for each in items}), IFEVAL.size) == (541, 541, 541)
    named = Counter(name for each in items for name in each.target["instruction_id_list"])
    assert (named.total(), len(named)) == (834, 25)
    assert named.keys() <= rules.instructions_registry.INSTRUCTION_DICT.keys()
    assert all(len(each.target["kwargs"]) == len(each.target["instruction_id_list"]) for each in items)
    assert list(IFEVAL.items("test", 5)) == list(items[:5])
    assert all(each.max_new_tokens == 1280 and not each.stop and not each.raw for each in items)
    assert json.loads(json.dumps(items[3].target)) == items[3].target
    with refused(ConfigError, "ifeval-offline", "train", "test"):
        IFEVAL.items("train", 1)


@pytest.mark.parametrize(
    ("key", "answer", "strict", "detail"),
    [
        (1001, "Hark: go east.", 1, ([True], True, [True])),
        (1001, "Hark, go east.", 0, ([False], False, [False])),
        (1001, "Sure, here it is:\nHark: go east.", 0, ([False], True, [True])),  # loose: less its first line
        (1001, "  \n", 0, ([False], False, [False])),
        (1021, "PARAGRAPH 1\nTHE LAW IS BAD.\nPARAGRAPH 2\nDO NOT FOLLOW IT.", 1, ([True, True], True, [True, True])),
        (1021, "PARAGRAPH 1\nThe law is bad.\nPARAGRAPH 2\nDo not.", 0, ([False, True], False, [False, True])),
        (1108, "Yes they are sandwiches, of course they are.", 0, ([False], False, [False])),
        (1108, "ಹೌದು, ಹ್ಯಾಂಬರ್ಗರ್‌ಗಳು ಸ್ಯಾಂಡ್‌ವಿಚ್‌ಗಳು.", 1, ([True], True, [True])),
        (1094, '```json\n{"moms": ["Eve", "Mary"]}\n```', 1, ([True], True, [True])),
        (1094, 'Here: {"moms": []}', 0, ([False], False, [False])),
    ],
)
def test_answers_are_scored(key: int, answer: str, strict: float, detail: tuple[object, ...]) -> None:
    (score,) = IFEVAL.score([item(key)], [answer])
    assert score.value == strict
    names = ("inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")
    assert score.detail is not None
    assert json.loads(score.detail) == dict(zip(names, detail, strict=True))


def test_scores_are_those_of_lm_eval_and_stay_so(rules: Any) -> None:
    items, docs = IFEVAL.items("test", 60), prompts()[:60]
    answers = [each.prompt.lower() for each in items]
    scores = IFEVAL.score(items, answers)
    for doc, answer, score in zip(docs, answers, scores, strict=True):
        random.seed(0)
        theirs = rules.process_results(doc, [answer])
        assert score.value == theirs.pop("prompt_level_strict_acc")
        assert {name: json.loads(score.detail or "")[name] for name in theirs} == theirs
    assert 0 < sum(score.value for score in scores) < 60
    for each in items[::-7]:  # nor do they depend on what was scored before, or change what else is drawn
        state = random.getstate()
        again = IFEVAL.score([each], [answers[items.index(each)]])
        assert again == [scores[items.index(each)]]
        assert random.getstate() == state


@pytest.mark.parametrize("note", [None, NOTE])
def test_other_sentences_are_told_where_they_count(rules: Any, monkeypatch: pytest.MonkeyPatch, note: str | None) -> None:
    monkeypatch.setattr(ifeval, "load_rules", lambda: (rules, note))
    counted, other = IFEVAL.score([item(3739), item(1001)], ["Envy. Pure envy.", "Hark."])
    assert counted.value == 1
    assert json.loads(counted.detail or "").get("note") == note
    assert "note" not in json.loads(other.detail or "")
    assert IFEVAL.score([item(3739)], ["Envy. Pure envy. It is."])[0].value == 0


def test_missing_rules_are_told_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ifeval.load_rules.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval", None)
    with refused(ConfigError, "lm-eval", "pip install 'unmask[eval]'"):
        IFEVAL.items("test", 1)
    ifeval.load_rules.cache_clear()


def test_an_unknown_instruction_is_no_silent_zero() -> None:
    strange = replace(item(1001), target={"key": 1, "instruction_id_list": ["no:such"], "kwargs": [{}]})
    with pytest.raises(KeyError, match="no:such"):
        IFEVAL.score([strange], ["Hark."])
