"""mini-5: splits that share nothing, targets that independent solvers confirm, scorers that only right answers please."""

import ast
import hashlib
import itertools
import json
import operator
import os
import random
import re
import subprocess
import sys
from typing import Any

import pytest
from mini5_items import generator_names, items_of, value

from helpers import make_tokenizer, refused
from unmask.data.generated import GeneratedSource
from unmask.engine.grammar import GrammarCompiler
from unmask.errors import ConfigError
from unmask.eval.mini5 import agent, generator, math, reasoning
from unmask.eval.mini5.generator import SPLITS, Generator, Question, questions, seeded, seeds, split_of, take_turns
from unmask.eval.mini5.scoring import canonical, same
from unmask.eval.mini5.tasks import agent_schema_task, mini5_tasks, training_records
from unmask.eval.task import Task

TASKS = mini5_tasks()
DIGEST = """
import hashlib, json
from unmask.eval.mini5.tasks import GENERATORS, mini5_tasks
items = [[item.id, item.prompt, item.target] for task in mini5_tasks() for item in task.items("test", 30)]
print(hashlib.sha256(json.dumps(items).encode()).hexdigest())
"""


def test_one_task_for_each_dimension() -> None:
    assert [(task.name, task.dimension) for task in TASKS] == [
        (f"mini-5/{dimension}", dimension) for dimension in ("knowledge", "reasoning", "coding", "math", "agent")
    ]


def test_no_seed_is_in_two_splits_or_in_reach_of_training_data(monkeypatch: pytest.MonkeyPatch) -> None:
    import reasoning_gym

    seen: list[int] = []
    create = reasoning_gym.create_dataset

    def spy(name: str, *, seed: int, size: int, **config: Any) -> Any:
        seen.append(seed)
        return create(name, seed=seed, size=size, **config)

    monkeypatch.setattr(reasoning_gym, "create_dataset", spy)
    for seed in range(10):
        GeneratedSource("training", {"chain_sum": {}, "leg_counting": {}}, None, seed=seed, items_per_epoch=4)  # type: ignore[arg-type]
    last_of_training = max(seen) + 10**11  # more items an epoch than anybody makes; item i is made with seed + i
    assert max(seen) < 2**31
    seen.clear()
    used = {}
    for split in SPLITS:
        for task in TASKS:
            task.items(split, 20)
        used[split] = set(seen)
        assert all(seed in seeds(split) for seed in seen)
        assert min(seen) > last_of_training
        seen.clear()
    for first, second in itertools.combinations(SPLITS, 2):
        assert seeds(first)[-1] < seeds(second)[0]
        assert not used[first] & used[second]


@pytest.mark.parametrize("count", [250, pytest.param(800, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.dimension)
def test_no_prompt_is_in_two_splits_or_twice(task: Task, count: int) -> None:
    prompts = {split: [item.prompt for item in task.items(split, count)] for split in SPLITS}
    everything = [prompt for made in prompts.values() for prompt in made]
    assert len(everything) == len(set(everything)) == 3 * count
    assert all(split_of(prompt) == split for split, made in prompts.items() for prompt in made)


@pytest.mark.parametrize("task", [*TASKS, agent_schema_task()], ids=lambda task: task.name)
def test_items_are_a_prefix_of_one_order(task: Task) -> None:
    for split in SPLITS:
        assert list(task.items(split, 7)) == list(task.items(split, 31))[:7]
    made = task.items("validation", 40)
    assert len({item.id for item in made}) == 40
    assert [item.id.split("/")[2] for item in made] == ["validation"] * 40


def test_items_are_the_same_in_every_process() -> None:
    """The digest is a promise to users: items that change need a new VERSION, and then a new digest here."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    other = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=environment)
    items = [[item.id, item.prompt, item.target] for task in TASKS for item in task.items("test", 30)]
    for digest in (other.stdout.strip(), hashlib.sha256(json.dumps(items).encode()).hexdigest()):
        assert digest == "3f632bedd5ebf7de7039b1ecbf0e2ba4c901aff76b84f3e0f7a18811e9e2ce9f"


def test_a_family_that_runs_dry_leaves_its_turn_to_others() -> None:
    few = Generator("few", seeded(lambda rng: Question(f"few {rng.randrange(12)}", {})))
    many = Generator("many", seeded(lambda rng: Question(f"many {rng.random()}", {})))
    items = take_turns("math", (few, many), "test", 40)
    names = [item.id.split("/")[1] for item in items]
    expected = sum(split_of(f"few {i}") == "test" for i in range(12))
    assert 0 < expected == names.count("few")
    assert len(items) == 40
    assert len(take_turns("math", (few,), "test", 40)) == expected


@pytest.mark.parametrize("task", [*TASKS, agent_schema_task()], ids=lambda task: task.name)
def test_the_canonical_answer_is_right_and_another_items_is_not(task: Task) -> None:
    items = task.items("test", 200)
    answers = [canonical(item.target) for item in items]
    assert [each.value for each in task.score(items, answers)] == [1.0] * 200
    shifted = answers[1:] + answers[:1]
    targets = [item.target for item in items[1:] + items[:1]]
    for item, target, other in zip(items, targets, shifted, strict=True):
        if not same(item.target["answer"], target["answer"]):
            assert value(item.target, other) == 0.0, (item, other)
    assert sum(each.value for each in task.score(items, [item.prompt for item in items])) < 30, "the prompt itself is no answer"
    assert not any(each.value for each in task.score(items, [""] * 200))


def test_words_to_choose_from_stand_in_the_prompt_and_yes_is_as_frequent_as_no() -> None:
    for dimension in ("knowledge", "reasoning"):
        for item in (each for name in generator_names(dimension) for each in items_of(dimension, name, 200)):
            among = item.target["among"]
            assert item.target["answer"] in among
            assert len(set(among)) == len(among)
            if among == ["yes", "no"]:
                continue
            assert "family_relationships" in item.id or all(word in item.prompt for word in among)
    for family in ("rules", "syllogism"):
        yes = [item.target["answer"] == "yes" for item in items_of("reasoning", family, 200)]
        assert 75 < sum(yes) < 125


def test_answers_of_knowledge_stand_beside_what_is_asked_for() -> None:
    for item in items_of("knowledge", "table"):
        rows = [line.split(" | ") for line in item.prompt.split("\n\n")[0].splitlines()[1:]]
        asked = item.prompt.rsplit("\n\n", 1)[1]
        (row,) = [row for row in rows if row[0] in asked]
        column = 1 if "job" in asked else 2 if "pet" in asked else 3
        assert row[column] == item.target["answer"]
    for item in items_of("knowledge", "two_hops"):
        (colour,) = re.findall(r"owner of the (\w+)", item.prompt)
        (owner,) = re.findall(rf"(\w+) owns the {colour} ", item.prompt)
        assert re.findall(rf"{owner} lives in (\w+)", item.prompt) == [item.target["answer"]]
    for item in items_of("knowledge", "update"):
        (asked,) = re.findall(r"Where does (\w+) live now", item.prompt)
        places = re.findall(rf"{asked} lived in (\w+)|{asked} moved from \w+ to (\w+)", item.prompt)
        assert (places[-1][1] or places[0][0]) == item.target["answer"]


def test_order_and_elimination_have_the_one_solution_that_is_asked_for() -> None:
    for item in items_of("reasoning", "order"):
        people = item.target["among"]
        facts = re.findall(r"(\w+) is \w+er than (\w+)", item.prompt)
        orders = [o for o in itertools.permutations(people) if all(o.index(a) < o.index(b) for a, b in facts)]
        assert len(orders) == 1
        is_top = re.search(r"the (tallest|oldest|fastest)", item.prompt)
        assert orders[0][0 if is_top else -1] == item.target["answer"]
    for item in items_of("reasoning", "elimination"):
        people = item.target["among"]
        pets = re.findall(r"\ba (\w+)", item.prompt.split(".")[0])
        has = re.findall(r"(\w+) has the (\w+)\.", item.prompt)
        lacks = re.findall(r"(\w+) does not have the (\w+)", item.prompt)
        fitting = [
            dict(zip(p, people, strict=True))
            for p in itertools.permutations(pets)
            if set(has) <= {(n, a) for n, a in zip(people, p, strict=True)}
            and not set(lacks) & set(zip(people, p, strict=True))
        ]
        assert len(fitting) == 1
        assert fitting[0][re.findall(r"Who has the (\w+)", item.prompt)[0]] == item.target["answer"]


def test_rules_follow_from_the_chain_and_hats_from_the_job() -> None:
    for item in items_of("reasoning", "rules"):
        rules = dict(re.findall(r"If (.+?), then (.+?)\.", item.prompt))
        seen, asked = re.findall(r"We see that (.+?)\. Does it follow that (.+?)\?", item.prompt)[0]
        reached = {seen}
        while (seen := rules.get(seen, "")) and seen not in reached:
            reached.add(seen)
        assert ("yes" if asked in reached else "no") == item.target["answer"]
    for item in items_of("reasoning", "hats"):
        hats = dict(re.findall(r"Every (\w+) has a hat that is (\w+)", item.prompt))
        jobs = dict(re.findall(r"(\w+) is a (\w+)\.", item.prompt))
        assert hats[jobs[re.findall(r"colour is (\w+)'s", item.prompt)[0]]] == item.target["answer"]


@pytest.mark.parametrize(
    ("first", "second", "conclusion", "expected"),
    [
        ((0, 0, 1), (0, 1, 2), (0, 0, 2), True),  # Barbara
        ((0, 0, 1), (1, 1, 2), (1, 0, 2), True),  # Celarent
        ((2, 0, 1), (0, 1, 2), (2, 0, 2), True),  # Darii
        ((0, 0, 1), (2, 1, 2), (2, 0, 2), False),  # undistributed middle
        ((0, 0, 1), (3, 1, 2), (3, 0, 2), False),  # the one reasoning-gym takes for valid
        ((1, 0, 1), (1, 1, 2), (1, 0, 2), False),  # two negatives
        ((0, 0, 1), (0, 1, 2), (2, 0, 2), None),  # Barbari: only if there are any
    ],
)
def test_syllogisms(first: Any, second: Any, conclusion: Any, expected: bool | None) -> None:
    assert reasoning.follows(first, second, conclusion) is expected


def test_family_relationships_are_those_of_the_story() -> None:
    for item in items_of("reasoning", "family_relationships", 200):
        couples = re.findall(r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]+)\.)?", item.prompt)
        married = {frozenset(couple[:2]) for couple in couples}
        parents = {
            child: set(couple[:2])
            for couple in couples
            for child in re.split(r", | and ", couple[2].replace(", and", ","))
            if child
        }
        question = item.prompt.rsplit("\n\n", 1)[1]
        first, second = [w for w in re.findall(r"\w+", question) if any(w in c for c in married) or w in parents]
        grandparents = {g for p in parents.get(second, ()) for g in parents.get(p, ())}
        siblings = bool(parents.get(first)) and parents.get(first) == parents.get(second)
        expected = {
            "father mother": first in parents.get(second, ()),
            "son daughter": second in parents.get(first, ()),
            "husband wife": frozenset((first, second)) in married,
            "brother sister": siblings,
            "grandfather grandmother": first in grandparents,
        }
        assert sum(expected.values()) == 1, item
        assert [item.target["answer"] in names.split() for names in expected] == list(expected.values()), item


def calculate(node: ast.AST) -> int:
    signs: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    if isinstance(node, ast.BinOp):
        return signs[type(node.op)](calculate(node.left), calculate(node.right))
    assert isinstance(node, ast.Constant)
    return node.value


@pytest.mark.parametrize("family", ["chain_sum", "basic_arithmetic"])
def test_sums_are_right(family: str) -> None:
    for item in items_of("math", family, 300):
        (sum_,) = re.findall(r"Calculate (.+?)\. Work", item.prompt)
        assert str(calculate(ast.parse(sum_, mode="eval").body)) == item.target["answer"], sum_


def test_word_problems_have_the_answers_worked_out_by_hand() -> None:
    shown = {"who": "Ann", "other": "Bo", "goods": "pears", "a": 12, "b": 4, "c": 3, "sum": 16, "product": 48, "total": 19}
    problems = (math.ONE_STEP, math.TWO_STEPS)
    found = [[math.worked(each.format(**shown).split(" = ")[1])[0] for each in templates] for templates in problems]
    assert found == [[16, 16, 12, 12, 48, 12], [51, 51, 19, 12, 28]]
    assert math.ONE_STEP[2].format(**shown).startswith("Ann had 16 pears and gave 4")
    assert math.ONE_STEP[5].format(**shown).startswith("Ann puts 48 pears into 4 bags")
    assert math.TWO_STEPS[3].format(**shown).startswith("Ann had 19 pears. Ann gave 4 to Bo and lost 3")


def test_calls_take_all_their_values_from_the_request() -> None:
    for name in generator_names("agent"):
        for item in items_of("agent", name):
            call = item.target["answer"]
            (request,) = re.findall(r"What is the answer for the request '(.*)'\?", item.prompt)
            assert all(str(each) in request for each in call["arguments"].values())
            shown = [json.loads(line) for line in item.prompt.splitlines() if line.startswith('{"name"')]
            assert len(shown) == ("one", "two", "three").index(name) + 1
            (function,) = [each for each in shown if each["name"] == call["name"]]
            assert function["parameters"].keys() == call["arguments"].keys()


def test_examples_give_no_part_of_the_call_away() -> None:
    for seed in range(500):
        draw = agent.draw_question(random.Random(seed), 2)
        if draw is not None:
            call = draw.target["answer"]
            examples = [json.loads(found) for found in re.findall(r"the answer is (\{.*\})", draw.prompt)]
            (same,) = [each for each in examples if each["name"] == call["name"]]
            assert not same["arguments"].items() & call["arguments"].items()


def test_grammars_allow_the_right_call_and_no_other_form(tmp_path: Any) -> None:
    tokenizer = make_tokenizer(tmp_path)
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_ids, tokenizer.vocab_size)

    def allows(schema: Any, text: str) -> bool:
        matcher = compiler.json_schema(schema).start()
        return all(matcher.accepts(token) and (matcher.advance(token) or True) for token in tokenizer.encode(text))

    for free, bound in zip(TASKS[4].items("test", 12), agent_schema_task().items("test", 12), strict=True):
        assert free.schema is None
        assert (free.prompt, free.target, free.id) == (bound.prompt, bound.target, bound.id)
        right = canonical(bound.target)
        assert allows(bound.schema, right)
        assert not allows(bound.schema, right.replace('"arguments"', '"parameters"'))
        assert not allows(bound.schema, right.replace('"name": "', '"name": "x'))


def test_training_records_are_items_with_their_answers() -> None:
    records = training_records("train", 23)
    assert records == training_records("train", 40)[:23]
    by_prompt = {item.prompt: item for task in TASKS for item in task.items("train", 10)}
    for record in records:
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert value(by_prompt[user["content"]].target, assistant["content"]) == 1.0
        assert assistant["content"] == canonical(by_prompt[user["content"]].target)
    assert {by_prompt[each["messages"][0]["content"]].id.split("/")[0] for each in records} == {t.dimension for t in TASKS}
    with refused(ConfigError, "test"):
        training_records("test", 3)  # type: ignore[arg-type]


def test_nothing_made_from_a_test_set_is_trained_on() -> None:
    gsm = next(family for family in math.GENERATORS if family.name == "gsm_symbolic")
    assert next(questions(gsm, "train"), None) is None
    assert next(questions(gsm, "validation"), None) is not None
    assert not any("gsm_symbolic" in item.id for item in TASKS[3].items("train", 100))


def test_a_gym_family_is_asked_with_the_seed_it_is_given() -> None:
    assert generator.gym("chain_sum", 2**40) == generator.gym("chain_sum", 2**40)
    assert generator.gym("chain_sum", 2**40) != generator.gym("chain_sum", 2**40 + 1)
