"""Scorers of mini-5: right answers in many forms, wrong ones that look right."""

import json
from typing import Any

import pytest
from mini5_items import value

from unmask.eval.mini5.scoring import score
from unmask.eval.task import Item

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
