"""The work that mini-5's answers show: every step of it is checked by other means than it was made with."""

import ast
import contextlib
import io
import itertools
import operator
import re
from pathlib import Path
from typing import Any

import pytest
from mini5_items import generator_names, items_of, value

from unmask.eval.mini5 import math, program
from unmask.eval.mini5.generator import take_turns
from unmask.eval.mini5.scoring import canonical, score
from unmask.eval.mini5.tasks import GENERATORS, mini5_tasks

TASKS = mini5_tasks()


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_answer_to_train_on_is_right_and_shows_its_work(split: Any, count: int) -> None:
    for dimension, made in GENERATORS.items():
        for family in made:
            items = take_turns(dimension, (family,), split, count)
            answers = [canonical(item.target) for item in items]
            assert all(each.value for each in score(items, answers)), family.name
            assert all(answer.isascii() for answer in answers)
            without = dimension == "agent" or family.name in ("family_relationships", "gsm_symbolic")
            assert [bool(item.target.get("work")) for item in items] == [not without] * len(items)
            assert len(items) == (count if family.trainable or split == "validation" else 0)
            if dimension in ("knowledge", "reasoning", "math"):
                texts = [f"{item.target.get('work', '')} Answer: {item.target['answer']}".strip() for item in items]
                assert answers == texts


def test_the_answer_counts_whatever_the_work() -> None:
    for task in TASKS[:4]:
        for item in task.items("validation", 60):
            marker = "Output:" if item.target["kind"] == "output" else "Answer:"
            wrong = "7 + 5 = 13, since 3 > 4 is True. It can not be.\n"
            assert value(item.target, f"{wrong}{marker} {item.target['answer']}") == 1.0
            assert value(item.target, f"{item.target.get('work', '')}\n{marker} nothing") == 0.0


def test_prompts_ask_for_work_and_name_the_form() -> None:
    for task in TASKS[:4]:
        for item in task.items("test", 60):
            form = {"word": "<word>", "number": "<number>", "output": "<what it prints>"}[item.target["kind"]]
            form = "<yes or no>" if item.target.get("among") == ["yes", "no"] else form
            assert item.prompt.count(f"{'Output' if task.dimension == 'coding' else 'Answer'}: {form}'.") == 1
            assert not re.search("only|one word[.]|single word", item.prompt.rsplit("?", 1)[-1], re.IGNORECASE)
            asks = re.search(r"Quote what says so|Explain in short steps|step by step|line by line", item.prompt)
            assert bool(asks) is ("family_relationships" not in item.id)


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.\s][^.]*\.", text)


def test_the_work_of_knowledge_quotes_what_the_answer_needs() -> None:
    for name in generator_names("knowledge"):
        for item in items_of("knowledge", name):
            statements, question = item.prompt.split("\n\n")
            work, answer = item.target["work"], item.target["answer"]
            if name == "table":
                person, *rest = re.findall(r"\w+", work)
                assert " | ".join([person, *rest]) in statements.splitlines()
                assert f"{person}: {', '.join(rest)}." == work
                assert re.search(rf"\b{person}\b", question)
            else:
                assert set(sentences(work)) <= set(sentences(statements))
            mentioned = [each for each in item.target["among"] if re.search(rf"\b{each}\b", work)]
            assert answer in mentioned
            if name == "update":
                (asked,) = re.findall(r"does (\w+) live", question)
                assert sentences(work) == [each for each in sentences(statements) if re.search(rf"\b{asked}\b", each)]
                assert work.endswith(f" {answer}.")
            else:
                assert mentioned == [answer]
            if name == "two_hops":
                owned, lived = sentences(work)
                assert re.findall(r"the (\w+ \w+)", owned) == re.findall(r"owner of the (\w+ \w+)", question)
                assert owned.split()[0] == lived.split()[0]


def test_the_work_of_reasoning_follows_from_what_is_told() -> None:
    for item in items_of("reasoning", "order"):
        *facts, last = sentences(item.target["work"])
        most, least, ranked = re.findall(r"From (\w+) to (\w+): (.+)\.", last)[0]
        first, second, third = ranked.split(", ")
        assert set(facts) <= set(sentences(item.prompt))
        assert [re.findall(r"[A-Z]\w+", fact) for fact in facts] == [[first, second], [second, third]]
        asked = re.findall(r"Who is the (\w+)", item.prompt)[0]
        assert {most: first, least: third}[asked] == item.target["answer"]
    for item in items_of("reasoning", "hats"):
        fact, rule = sentences(item.target["work"])
        assert {fact, rule} <= set(sentences(item.prompt))
        person, job = re.findall(r"(\w+) is a (\w+)\.", fact)[0]
        assert f"{person}'s hat" in item.prompt
        assert rule == f"Every {job} has a hat that is {item.target['answer']}."
    for item in items_of("reasoning", "elimination"):
        has = dict(re.findall(r"(\w+) has the (\w+)", item.target["work"]))
        left, who = re.findall(r"That leaves the (\w+) for (\w+)\.", item.target["work"])[0]
        lacks = re.findall(r"\w+ does not have the \w+", item.target["work"])
        assert lacks == re.findall(r"\w+ does not have the \w+", item.prompt)
        assert re.findall(r"(\w+) has the (\w+)\.", item.prompt)[0] in has.items()
        assert sorted([*has.values(), left]) == sorted(re.findall(r"\ba (\w+)", item.prompt.split(".")[0]))
        assert sorted([*has, who]) == sorted(item.target["among"])
        assert who == item.target["answer"]


def test_the_work_of_rules_goes_as_far_as_they_go() -> None:
    for item in items_of("reasoning", "rules"):
        rules = dict(re.findall(r"If (.+?), then (.+?)\.", item.prompt))
        state, asked = re.findall(r"We see that (.+?)\. Does it follow that (.+?)\?", item.prompt)[0]
        work = item.target["work"].lower()
        for before, after in re.findall(r"(the [a-z ]+), so (.+?)\.", work):
            assert (before, after) == (state, rules[state])
            state = after
        ends = sentences(work)[-2:]
        stopped = [f"no rule says what follows if {state}.", f"it does not follow that {asked}."]
        assert (ends == stopped) is (state not in rules and state != asked) is (item.target["answer"] == "no")
        assert item.target["answer"] == "no" or state == asked


def holds(statement: str, cases: list[set[str]]) -> bool:
    form, first, second = re.fullmatch(r"(All|No|Some) (\w+) are ((?:not )?\w+)\.?", statement, re.IGNORECASE).groups()  # type: ignore[union-attr]
    denied, second = second.startswith("not "), second.removeprefix("not ")
    inside = [(second in case) is not denied for case in cases if first in case]
    return {"all": all(inside), "no": not any(inside), "some": any(inside)}[form.lower()]


def test_the_work_of_syllogisms_proves_them_or_gives_a_counterexample() -> None:
    for item in items_of("reasoning", "syllogism", 400):
        first, second, _ = sentences(item.prompt.replace("Does it", "."))
        claim = re.findall(r"follow that (.+?)\?", item.prompt)[0]
        work = item.target["work"]
        if item.target["answer"] == "no":
            assert work.startswith("It can be: ")
            assert work.endswith("; there are no others.")
            cases = [set(each.split(" and ")) for each in re.findall(r"some are only (.+?);", work)]
            assert holds(first, cases)
            assert holds(second, cases)
            assert not holds(claim, cases)
            assert set().union(*cases) == set(re.findall(r"(\w+) are (?:not )?(\w+)", first)[0]) | set(
                re.findall(r"(\w+) are (?:not )?(\w+)", second)[0]
            )
            continue
        amount, subject, middle, last = re.fullmatch(r"Take (any|some) (\w+): they are (.+), so they are (.+)\.", work).groups()  # type: ignore[union-attr]
        step = {"All": "any {} {}", "No": "any {} not {}", "Some": "some {} {}"}[first.split()[0]]
        parts = re.findall(r"\w+ (\w+) are ((?:not )?\w+)\.", first)[0]
        assert f"{amount} {subject} {middle}" == step.format(*parts)
        # Whatever is `middle` is `last`, by the second premise alone.
        kinds = [each.removeprefix("not ") for each in (middle, last)]
        every = [
            {kind for kind, given in zip(kinds, bits, strict=True) if given} for bits in itertools.product((0, 1), repeat=2)
        ]
        for case in every:
            if holds(second, [case]) and (kinds[0] in case) is (middle == kinds[0]):
                assert (kinds[1] in case) is (last == kinds[1])
        assert claim.startswith("some" if amount == "some" else ("no" if last.startswith("not ") else "all"))
        assert claim.removeprefix("some ") == f"{subject} are {last}" or amount == "any"
        assert re.findall(r"\w+", claim)[-1] == kinds[1]


def replay(trace: str) -> dict[str, Any]:
    """Variables at the end of a trace, every one of its equations checked."""
    held: dict[str, Any] = {}
    for line in trace.splitlines():
        loop, done = re.fullmatch(r"(?:(\w+ = \d+): )?(.+)", line).groups()  # type: ignore[union-attr]
        if loop:
            held[loop.split(" = ")[0]] = int(loop.split(" = ")[1])
        if done.endswith((" is True", " is False")):
            assert str(eval(done.rsplit(" is ", 1)[0], {}, held)) == done.rsplit(" is ", 1)[1]
            continue
        sides = done.split(" = ")
        values = [eval(side, {}, held) for side in sides[sides[0].isidentifier() :]]
        assert all(each == values[0] for each in values), line
        if sides[0].isidentifier():
            held[sides[0]] = values[0]
        else:
            assert line == trace.splitlines()[-1]
    return held


def test_programs_print_what_python_prints_and_traces_end_there() -> None:
    for name in generator_names("coding"):
        for item in items_of("coding", name, 120):
            (source,) = re.findall(r"```python\n(.*)\n```", item.prompt, re.DOTALL)
            printed = io.StringIO()
            variables: dict[str, Any] = {}
            with contextlib.redirect_stdout(printed):
                exec(source, variables)  # a program of our own generator, in a test
            assert printed.getvalue() == item.target["answer"] + "\n", source
            del variables["__builtins__"]
            work = item.target["work"]
            assert replay(work) == variables
            (shown,) = re.findall(r"print\((.*)\)$", source)
            last = work.splitlines()[-1]
            assert shown.isidentifier() or str(eval(last.rsplit(" = ", 1)[1])) + "\n" == printed.getvalue()
            assert len(work.splitlines()) >= source.count(" = ")
            assert canonical(item.target) == f"{work}\nOutput: {item.target['answer']}"


def test_a_trace_has_a_line_for_every_statement_that_ran() -> None:
    source = """
n = 1
for k in range(3, 5):
    n += k * 2
if n > 9:
    m = 'stone'
else:
    m = 'cloud'
items = [4, 5]
items.append(n)
items = items[1:3]
print(max(items))
"""
    output, trace = program.run(source)
    assert output == "15"
    assert trace.splitlines() == [
        "n = 1",
        "k = 3: n = 1 + 6 = 7",
        "k = 4: n = 7 + 8 = 15",
        "15 > 9 is True",
        "m = 'stone'",
        "items = [4, 5]",
        "items = [4, 5, 15]",
        "items = items[1:3] = [5, 15]",
        "max(items) = 15",
    ]


def test_no_program_is_run_as_text() -> None:
    source = ast.parse(Path(program.__file__).read_text(encoding="utf-8"))
    assert not {"exec", "eval", "compile"} & {node.id for node in ast.walk(source) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("family", [each for each in generator_names("math") if each != "gsm_symbolic"])
def test_every_operation_of_the_work_is_right_and_the_last_gives_the_answer(family: str) -> None:
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    for item in items_of("math", family, 300):
        question, work = item.prompt.split("Work it out")[0], item.target["work"]
        steps = re.findall(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)\.(?: |$)", work)
        assert work == " ".join(f"{a} {sign} {b} = {c}." for a, sign, b, c in steps)
        assert all(operations[sign](int(a), int(b)) == int(c) for a, sign, b, c in steps)
        assert steps[-1][3] == item.target["answer"]
        assert len(steps) == {"chain_sum": 2, "one_step": 1, "two_steps": 2}.get(
            family, len(re.findall(r"\s[-+*]\s", question))
        )
        known = set(re.findall(r"\d+", question))  # no number comes from nowhere
        for a, _, b, c in steps:
            assert {a, b} <= known, item
            known.add(c)


def test_a_sum_whose_answer_is_another_is_not_asked() -> None:
    assert math.worked("4 - ( 2 - 5 ) * 3") == (13, "2 - 5 = -3. -3 * 3 = -9. 4 - -9 = 13.")
    assert math.calculate("6 - 1 * 3", "15") is None
    assert math.calculate("6 - 1 * 3", "3") is not None
