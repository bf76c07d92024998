"""mini-5: splits that share nothing, targets that independent solvers confirm, scorers that only right answers please."""

import ast
import contextlib
import hashlib
import io
import itertools
import json
import operator
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import make_tokenizer
from unmask.data.generated import GeneratedSource
from unmask.engine.grammar import GrammarCompiler
from unmask.errors import ConfigError
from unmask.eval import mini5_agent, mini5_coding, mini5_families, mini5_math, mini5_reasoning
from unmask.eval.mini5 import agent_schema_task, families, mini5_tasks, training_records
from unmask.eval.mini5_answers import canonical, score
from unmask.eval.mini5_families import SPLITS, Draw, Family, draws, seeded, seeds, split_of, take_turns
from unmask.eval.task import Item, Task

TASKS = mini5_tasks()
DIGEST = """
import hashlib, json
from unmask.eval.mini5 import mini5_tasks
items = [[item.id, item.prompt, item.target] for task in mini5_tasks() for item in task.items("test", 30)]
print(hashlib.sha256(json.dumps(items).encode()).hexdigest())
"""


def family_items(dimension: str, family: str, count: int = 150) -> list[Item]:
    task = next(each for each in TASKS if each.dimension == dimension)
    made = task.items("test", count * len(families(task.dimension)))
    return [item for item in made if item.id.split("/")[1] == family]


def value(target: dict[str, Any], answer: str) -> float:
    return score([Item("x", "?", target)], [answer])[0].value


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
    for seed in range(50):
        GeneratedSource("training", {"chain_sum": {}, "leg_counting": {}}, None, seed=seed, items_per_epoch=4)  # type: ignore[arg-type]
    last_of_training = max(seen) + 10**11  # more items an epoch than anybody makes; item i is made with seed + i
    assert max(seen) < 2**31
    seen.clear()
    used = {}
    for split in SPLITS:
        for task in TASKS:
            task.items(split, 60)
        used[split] = set(seen)
        assert used[split] <= set(seeds(split)) if len(seeds(split)) < 10**6 else all(each in seeds(split) for each in seen)
        assert min(seen) > last_of_training
        seen.clear()
    for first, second in itertools.combinations(SPLITS, 2):
        assert max(seeds(first)) < min(seeds(second))
        assert not used[first] & used[second]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.dimension)
def test_no_prompt_is_in_two_splits_or_twice(task: Task) -> None:
    prompts = {split: [item.prompt for item in task.items(split, 1500)] for split in SPLITS}
    everything = [prompt for made in prompts.values() for prompt in made]
    assert len(everything) == len(set(everything)) == 4500
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
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    items = [[item.id, item.prompt, item.target] for task in TASKS for item in task.items("test", 30)]
    assert digests == {hashlib.sha256(json.dumps(items).encode()).hexdigest()}
    assert digests == {"GOLDEN"}


def test_a_family_that_runs_dry_leaves_its_turn_to_others() -> None:
    few = Family("few", seeded(lambda rng: Draw(f"few {rng.randrange(12)}", {})))
    many = Family("many", seeded(lambda rng: Draw(f"many {rng.random()}", {})))
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
    for item, answer, other in zip(items, answers, shifted, strict=True):
        if answer.lower() != other.lower():
            assert value(item.target, other) == 0.0, (item, other)
    assert sum(each.value for each in task.score(items, [item.prompt for item in items])) < 30, "the prompt itself is no answer"
    assert not any(each.value for each in task.score(items, [""] * 200))


def test_words_to_choose_from_stand_in_the_prompt_and_yes_is_as_frequent_as_no() -> None:
    for dimension in ("knowledge", "reasoning"):
        for item in (each for name in families(dimension) for each in family_items(dimension, name, 200)):
            among = item.target["among"]
            assert item.target["answer"] in among
            assert len(set(among)) == len(among)
            if among == ["yes", "no"]:
                continue
            assert "family_relationships" in item.id or all(word in item.prompt for word in among)
    for family in ("rules", "syllogism"):
        yes = [item.target["answer"] == "yes" for item in family_items("reasoning", family, 200)]
        assert 75 < sum(yes) < 125


def test_answers_of_knowledge_stand_beside_what_is_asked_for() -> None:
    for item in family_items("knowledge", "table"):
        rows = [line.split(" | ") for line in item.prompt.split("\n\n")[0].splitlines()[1:]]
        asked = item.prompt.rsplit("\n\n", 1)[1]
        (row,) = [row for row in rows if row[0] in asked]
        column = 1 if "job" in asked else 2 if "pet" in asked else 3
        assert row[column] == item.target["answer"]
    for item in family_items("knowledge", "two_hops"):
        (colour,) = re.findall(r"owner of the (\w+)", item.prompt)
        (owner,) = re.findall(rf"(\w+) owns the {colour} ", item.prompt)
        assert re.findall(rf"{owner} lives in (\w+)", item.prompt) == [item.target["answer"]]
    for item in family_items("knowledge", "update"):
        (asked,) = re.findall(r"Where does (\w+) live now", item.prompt)
        places = re.findall(rf"{asked} lived in (\w+)|{asked} moved from \w+ to (\w+)", item.prompt)
        assert (places[-1][1] or places[0][0]) == item.target["answer"]


def test_order_and_elimination_have_the_one_solution_that_is_asked_for() -> None:
    for item in family_items("reasoning", "order"):
        people = item.target["among"]
        facts = re.findall(r"(\w+) is \w+er than (\w+)", item.prompt)
        orders = [o for o in itertools.permutations(people) if all(o.index(a) < o.index(b) for a, b in facts)]
        assert len(orders) == 1
        is_top = re.search(r"the (tallest|oldest|fastest)", item.prompt)
        assert orders[0][0 if is_top else -1] == item.target["answer"]
    for item in family_items("reasoning", "elimination"):
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
    for item in family_items("reasoning", "rules"):
        rules = dict(re.findall(r"If (.+?), then (.+?)\.", item.prompt))
        seen, asked = re.findall(r"We see that (.+?)\. Does it follow that (.+?)\?", item.prompt)[0]
        reached = {seen}
        while (seen := rules.get(seen, "")) and seen not in reached:
            reached.add(seen)
        assert ("yes" if asked in reached else "no") == item.target["answer"]
    for item in family_items("reasoning", "hats"):
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
    assert mini5_reasoning.follows(first, second, conclusion) is expected


def test_family_relationships_are_those_of_the_story() -> None:
    for item in family_items("reasoning", "family_relationships", 200):
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
        assert [item.target["answer"] in names.split() for names in expected] == list(expected.values()), item


def test_programs_print_what_python_prints() -> None:
    for name in families("coding"):
        for item in family_items("coding", name, 250):
            (source,) = re.findall(r"```python\n(.*)\n```", item.prompt, re.DOTALL)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(source, {})  # a program of our own generator, in a test
            assert printed.getvalue() == item.target["answer"] + "\n", source


def test_no_program_is_run_as_text() -> None:
    source = ast.parse(Path(mini5_coding.__file__).read_text(encoding="utf-8"))
    assert not {"exec", "eval", "compile"} & {node.id for node in ast.walk(source) if isinstance(node, ast.Name)}


def calculate(node: ast.AST) -> int:
    signs: dict[type, Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    if isinstance(node, ast.BinOp):
        return signs[type(node.op)](calculate(node.left), calculate(node.right))
    assert isinstance(node, ast.Constant)
    return node.value


@pytest.mark.parametrize("family", ["chain_sum", "basic_arithmetic"])
def test_sums_are_right(family: str) -> None:
    for item in family_items("math", family, 300):
        (sum_,) = re.findall(r"Calculate (.+?)\. End", item.prompt)
        assert str(calculate(ast.parse(sum_, mode="eval").body)) == item.target["answer"], sum_


def test_word_problems_have_the_answers_worked_out_by_hand() -> None:
    assert [answer(12, 4) for _, answer in mini5_math._ONE_STEP] == [16, 16, 12, 12, 48, 12]
    assert [answer(12, 4, 3) for _, answer in mini5_math._TWO_STEPS] == [51, 51, 19, 12, 28]
    shown = {"who": "Ann", "other": "Bo", "goods": "pears", "a": 12, "b": 4, "c": 3, "sum": 16, "product": 48, "total": 19}
    assert mini5_math._ONE_STEP[2][0].format(**shown).startswith("Ann had 16 pears and gave 4")
    assert mini5_math._ONE_STEP[5][0].format(**shown).startswith("Ann puts 48 pears into 4 bags")
    assert mini5_math._TWO_STEPS[3][0].format(**shown).startswith("Ann had 19 pears. Ann gave 4 to Bo and lost 3")


def test_calls_take_all_their_values_from_the_request() -> None:
    for name in families("agent"):
        for item in family_items("agent", name):
            call = item.target["answer"]
            (request,) = re.findall(r"What is the answer for the request '(.*)'\?", item.prompt)
            assert all(str(each) in request for each in call["arguments"].values())
            shown = [json.loads(line) for line in item.prompt.splitlines() if line.startswith('{"name"')]
            assert len(shown) == ("one", "two", "three").index(name) + 1
            (function,) = [each for each in shown if each["name"] == call["name"]]
            assert function["parameters"].keys() == call["arguments"].keys()


def test_examples_give_no_part_of_the_call_away() -> None:
    for seed in range(500):
        draw = mini5_agent._draw(random.Random(seed), 2)
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
    assert {by_prompt[each["messages"][0]["content"]].id.split("/")[0] for each in records} == {t.dimension for t in TASKS}
    with pytest.raises(ConfigError, match="no training may see"):
        training_records("test", 3)  # type: ignore[arg-type]


def test_nothing_made_from_a_test_set_is_trained_on() -> None:
    gsm = next(family for family in mini5_math.FAMILIES if family.name == "gsm_symbolic")
    assert next(draws(gsm, "train"), None) is None
    assert next(draws(gsm, "validation"), None) is not None
    assert not any("gsm_symbolic" in item.id for item in TASKS[3].items("train", 100))


WORD = {"kind": "word", "answer": "Oslo", "among": ["Oslo", "Lima", "Rome"]}
NO = {"kind": "word", "answer": "no", "among": ["yes", "no"]}
MOTHER = {"kind": "word", "answer": "mother", "among": ["mother", "mother-in-law", "grandmother"]}
NUMBER = {"kind": "number", "answer": "1234"}
FIVE = {"kind": "number", "answer": "5"}
MINUS = {"kind": "number", "answer": "-3"}
TEXT = {"kind": "output", "answer": "Tiger"}
PRINTED = {"kind": "output", "answer": "17"}
LIST = {"kind": "output", "answer": "[1, 2]"}
CALL = {"kind": "call", "answer": {"name": "set", "arguments": {"room": "hall", "degrees": 5}}}
WRITTEN = '{"name": "set", "arguments": {"room": "hall", "degrees": 5}}'


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        *[
            (WORD, each)
            for each in ("Oslo", " oslo.\n", "Mira lives in Oslo.", "Answer: Oslo", "**Answer:** Oslo", "Oslo, not Lima.")
        ],
        *[
            (WORD, each)
            for each in ("It is not Lima, it is Oslo.", "Lima is wrong. The answer is Oslo.", "Answer:\nOslo", "OSLO!")
        ],
        *[
            (WORD, each)
            for each in ("Lima comes first, then Rome. So Anna lives in Oslo.", "Lima or Rome?\nAnswer: Oslo because so.")
        ],
        *[(NO, each) for each in ("No", "no.", "No, it does not follow.", "No it does not follow", "The answer is no.")],
        *[(MOTHER, each) for each in ("mother", "Mother.", "She is his mother", "not the grandmother but the mother")],
        *[
            (NUMBER, each)
            for each in ("1234", "1,234", "$1,234.00", "Answer: 1234.", "The answer is 1234 apples.", "1000 + 234 = 1234")
        ],
        *[
            (NUMBER, each)
            for each in ("First 5, then 7.\nAnswer: 1234", "Answer: 1234 (1000 + 234)", "answer: 1000 + 234 = 1234")
        ],
        *[
            (NUMBER, each)
            for each in ("5 is not it. Answer: 1234", "Answer: 7\nNo, wrong.\nAnswer: **1234**", r"Answer: \boxed{1234}")
        ],
        *[(MINUS, each) for each in ("-3", "−3", "5 - 8 = -3", "Answer: -3", "Answer: -3.0")],
        *[(TEXT, each) for each in ("Tiger", "'Tiger'", "`Tiger`", "```\nTiger\n```", "Output: Tiger", "The output is Tiger.")],
        *[
            (TEXT, each)
            for each in ('The program prints "Tiger" because x is 3.', "The output of this Python program is:\n\n`Tiger`\n\nAs")
        ],
        *[
            (PRINTED, each)
            for each in ("17", "Output: 17", "```python\n17\n```", "It prints 17, as 8 + 9 is 17.", "The output is `17`")
        ],
        *[(PRINTED, each) for each in ("The output of this program is: 17\n\nThis is because 3 + 4 is 5.", "8 + 9 = 17")],
        *[(LIST, each) for each in ("[1, 2]", "[1,2]", "Output: [1, 2]", "The output is `[1, 2]`.\nBecause [3] was cut.")],
        *[
            (CALL, each)
            for each in (WRITTEN, f"```json\n{WRITTEN}\n```", f"Here: {WRITTEN} Done.", f"<tool_call>[{WRITTEN}]</tool_call>")
        ],
        *[
            (CALL, each)
            for each in (WRITTEN + WRITTEN, WRITTEN.replace("hall", "Hall "), WRITTEN.replace("5", "5.0"), WRITTEN + ' {"na')
        ],
        (CALL, '{"arguments": {"degrees": 5,\n "room": "hall"}, "name": "set"}'),
    ],
)
def test_right_answers_in_many_forms(target: dict[str, Any], answer: str) -> None:
    assert value(target, answer) == 1.0


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        *[
            (WORD, each)
            for each in ("", "  \n", "Lima", "Oslo or Lima", "Oslo\nLima", "The answer is not Oslo.", "It isn't Oslo.")
        ],
        *[
            (WORD, each)
            for each in ("Oslofjord", "Answer: Lima\nOslo", "Answer: none, though Oslo is near" * 0, "Oslo is wrong.")
        ],
        *[
            (WORD, each)
            for each in ("She does not live in Oslo.", "Answer:", "Oslo? Answer: Rome", "Rome rather than Oslo", "Osl o")
        ],
        *[
            (NO, each)
            for each in ("Yes", "", "yes and no", "The answer is not no.", "Nothing follows", "North", "Yes, no doubt.")
        ],
        *[
            (MOTHER, each)
            for each in ("mother-in-law", "grandmother", "She is not his mother", "mother or grandmother", "mothers")
        ],
        *[
            (FIVE, each)
            for each in ("", "The answer is not 5", "The answer isn't 5.", "5 or 6", "6 or 5", "Answer: 5 or 6", "15", "5.5")
        ],
        *[
            (FIVE, each)
            for each in ("five", "Answer: 5\nAnswer: 6", "5 apples and 6 pears", "10/5", "Answer: 3 + 5", "0.5", "50%", "v5")
        ],
        *[
            (FIVE, each)
            for each in ("-5", "Answer: 5 and 7", "not 5", "5 is wrong", "5,000", "Answer: 5 = 4 + 2", "2 * 5", "٥")
        ],
        *[(MINUS, each) for each in ("3", "5-3", "- 4", "8 - 3", "-30")],
        *[
            (TEXT, each)
            for each in ("", "tiger", "TIGER", "Tigers", "Lion\nTiger", "not Tiger", "x = 'Tiger'", "Tiger Tiger", "``````")
        ],
        *[
            (PRINTED, each)
            for each in ("", "not 17", "17.0", "16\n17", "17 or 18", "The output is not 17.", "1 7", "17 + 1", "Output: x = 8")
        ],
        *[(LIST, each) for each in ("", "[2, 1]", "1, 2", "[1, 2] or [2]", "[1, 2, 3]", "[1, 2", "['1', '2']", "(1, 2)")],
        *[
            (CALL, each)
            for each in ("", "{}", "[]", "null", WRITTEN[:-1], WRITTEN.replace("5", '"5"'), WRITTEN.replace("hall", "kitchen"))
        ],
        *[
            (CALL, each)
            for each in (
                WRITTEN.replace("set", "get"),
                WRITTEN.replace("arguments", "parameters"),
                WRITTEN.replace("5", "true"),
            )
        ],
        *[
            (CALL, each)
            for each in (WRITTEN + WRITTEN.replace("5", "6"), WRITTEN[:-1] + ', "x": 1}', WRITTEN.replace("5", "NaN"))
        ],
        *[
            (CALL, each)
            for each in (
                WRITTEN.replace('"degrees"', '"degrees": 4, "degrees"'),
                "{" * 5000,
                '{"a":' * 5000,
                '{"a":' + "[" * 90000,
            )
        ],
        (CALL, WRITTEN.replace("5", "9" * 5000)),
        (CALL, json.dumps({"tools": [CALL["answer"]]})),
        (FIVE, "Answer: " + "5" * 10_000),
    ],
)
def test_wrong_answers_that_look_right(target: dict[str, Any], answer: str) -> None:
    assert value(target, answer) == 0.0


def test_what_was_read_out_of_an_answer_is_kept() -> None:
    made = score([Item("a", "?", FIVE), Item("b", "?", CALL), Item("c", "?", CALL)], ["So 1 + 6 = 7", "no call", "{}"])
    assert [(each.value, each.extracted) for each in made] == [(0.0, "7"), (0.0, None), (0.0, "{}")]
    assert made[1].detail == "no JSON object"


def test_true_is_not_one() -> None:
    target = {"kind": "call", "answer": {"name": "f", "arguments": {"n": 1}}}
    assert value(target, '{"name": "f", "arguments": {"n": true}}') == 0.0
    assert value(target, '{"name": "f", "arguments": {"n": 1}}') == 1.0


def test_a_gym_family_is_asked_with_the_seed_it_is_given() -> None:
    assert mini5_families.gym("chain_sum", 2**40) == mini5_families.gym("chain_sum", 2**40)
    assert mini5_families.gym("chain_sum", 2**40) != mini5_families.gym("chain_sum", 2**40 + 1)
