"""Needle tests: prompts that fill the context they are for, facts where they should stand, and a strict scorer."""

import json
import re
from itertools import pairwise

import pytest

from helpers import refused
from unmask.errors import ConfigError
from unmask.eval.needle import DEPTHS, needle_tasks
from unmask.eval.task import Split, Task


def count_words(text: str) -> int:
    """A stand-in for a tokenizer: a template of 20 tokens around one per word or other character."""
    return 20 + len(re.findall(r"\w+|[^\w\s]", text))


TASKS = {task.name.split("/")[1]: task for task in needle_tasks([600], count_words)}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def test_four_tasks_for_every_length() -> None:
    names = [task.name for task in needle_tasks([512, 2048], count_words)]
    kinds = ("single", "multi_key", "multi_value", "tracking")
    assert names == [f"needle/{kind}/{length}" for length in (512, 2048) for kind in kinds]


@pytest.mark.parametrize("length", [256, 1000, 4096])
def test_prompts_fill_the_context_but_for_the_answer(length: int) -> None:
    for task in needle_tasks([length], count_words):
        for item in task.items("test", 5):
            used = count_words(item.prompt) + item.max_new_tokens
            assert length - 20 <= used <= length, (task.name, used)  # no sentence has 20 words


@pytest.mark.parametrize("kind", ["single", "multi_key"])
def test_the_fact_that_is_asked_for_stands_at_its_depth(kind: str) -> None:
    (task,) = [each for each in needle_tasks([4000], count_words) if kind in each.name]
    items = task.items("test", 2 * len(DEPTHS))
    for index, item in enumerate(items):
        (key,) = re.findall(r"secret number of (\S+)\? ", item.prompt)
        text = item.prompt.split("\n\n")[1]
        fact = f"The secret number of {key} is {item.target[0]}."
        assert text.count(fact) == 1
        place = text.index(fact) / (len(text) - len(fact))
        assert place == pytest.approx(DEPTHS[index % len(DEPTHS)], abs=0.05)
        assert f"/{DEPTHS[index % len(DEPTHS)]:g}/test/{index}" in item.id


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_other_facts_are_spread_over_the_text(depth: float) -> None:
    (task,) = [each for each in needle_tasks([4000], count_words, depths=[depth]) if "multi_key" in each.name]
    for item in task.items("test", 3):
        text = item.prompt.split("\n\n")[1]
        places = sorted(found.start() / len(text) for found in re.finditer("The secret number", text))
        assert len(places) == 4
        assert len(re.findall(r"The secret number of (\S+) is", text)) == 4
        assert min(b - a for a, b in pairwise(places)) > 0.15


def test_targets_are_all_that_the_text_says_and_distractors_differ() -> None:
    for item in TASKS["multi_value"].items("test", 6):
        (key,) = re.findall(r"secret numbers of (\S+)\?", item.prompt)
        assert set(re.findall(rf"number of {key} is ([0-9]+)", item.prompt)) == set(item.target)
        assert len(item.target) == 4
    for item in TASKS["multi_key"].items("test", 6):
        facts = re.findall(r"number of (\S+) is ([0-9]+)", item.prompt)
        assert len(dict(facts)) == len({number for _, number in facts}) == 4
    for item in TASKS["tracking"].items("test", 6):
        (number,) = re.findall(r"have the value ([0-9]+)", item.prompt)
        values: dict[str, str] = {}
        for name, copied, given in re.findall(r"VAR (\w+) = (?:VAR (\w+)|([0-9]+))\.", item.prompt):
            values[name] = given or values[copied]  # each is defined before it is copied
        assert len(values) == 6
        assert sorted(name for name, each in values.items() if each == number) == sorted(item.target)


def test_hay_is_varied_and_holds_no_needle() -> None:
    (item,) = needle_tasks([8000], count_words)[0].items("test", 1)
    sentences = [each for each in re.split(r"(?<=\.) ", item.prompt.split("\n\n")[1]) if "secret number" not in each]
    assert len(sentences) > 400
    assert len(set(sentences)) > 0.95 * len(sentences)
    assert not re.search(r"[0-9]|\b[A-Z]{2,}\b", " ".join(sentences))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_items_are_stable_and_splits_share_no_number(task: Task) -> None:
    numbers = {}
    for split in SPLITS:
        assert list(task.items(split, 2)) == list(task.items(split, 5))[:2]
        numbers[split] = {n for item in task.items(split, 20) for n in re.findall("[0-9]{6}", item.prompt)}
    assert not numbers["train"] & numbers["validation"]
    assert not numbers["train"] & numbers["test"]
    assert not numbers["validation"] & numbers["test"]
    assert all({int(n) % 3 for n in numbers[split]} == {i} for i, split in enumerate(SPLITS))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_only_all_that_was_asked_for_is_right(task: Task) -> None:
    (item,) = task.items("test", 1)
    answers = {
        ", ".join(item.target): 1.0,
        f"They are:\n- {' and '.join(reversed(item.target))}.": 1.0,
        json.dumps(item.target): 1.0,
        f"{' '.join(item.target)} {item.target[0]}": 1.0,
        "": 0.0,
        "I do not know.": 0.0,
        ", ".join(item.target[1:]): 0.0,
        f"{', '.join(item.target)}, 123456, ABCD": 0.0,
        " ".join(each[:-1] for each in item.target): 0.0,
        " ".join(each + each[0] for each in item.target): 0.0,
        item.prompt.split("\n\n")[1]: float(item.id.startswith(("single", "multi_value"))),  # nothing else is in the text
    }
    scores = task.score([item] * len(answers), list(answers))
    assert dict(zip(answers, [each.value for each in scores], strict=True)) == answers
    assert scores[0].detail == f"{len(item.target)} of {len(item.target)} found"


def test_a_context_without_room_for_the_question_is_refused() -> None:
    with refused(ConfigError, "fit"):
        needle_tasks([80], count_words)[0].items("test", 1)


@pytest.mark.parametrize("depths", [[], [0.5, 1.2], [-0.1]])
def test_depths_outside_the_text_are_refused(depths: list[float]) -> None:
    with refused(ConfigError, "depths"):
        needle_tasks([512], count_words, depths=depths)
