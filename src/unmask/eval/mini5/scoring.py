"""Answer extraction and comparison: lenient about form, strict about content.

Owns the kinds of target and their rules. Knows no question and no model.

A target is `{"kind": ..., "answer": ...}`: `word` (one of the words in `among`), `number`, `output` (of a program) or `call`
(a JSON object). The text after the last "Answer:" or "answer is" counts, else the end of the text. What the text denies
("not 5") or leaves open ("5 or 6") is no answer. A target's "work" is for training and never compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from unmask.eval.task import Item, ItemScore

_MARKER = re.compile(r"\banswer(?:\s+is)?\W{0,3}:|\banswer\s+is\b", re.IGNORECASE)
_NAMED = r"\b(?:answer|output|result)(?:\s+of\s+(?:the|this)(?:\s+\w+){1,3}?)?"
_OUTPUT = re.compile(rf"{_NAMED}(?:\s+(?:is|would be|will be))?\W{{0,3}}:", re.IGNORECASE)
_PRINTS = re.compile(rf"{_NAMED}\s+(?:is|would be|will be)\b|\b(?:prints|will print)\b", re.IGNORECASE)
_ANNOUNCED = re.compile(r"\A(?:\s*the\b)?(?:\s*(?:string|word|text|value|number|list)\b)?:?\s*", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_CLAUSE = re.compile(r"[,.;:!?\n]|\b(?:but|so|because|then|therefore|and)\b", re.IGNORECASE)
_DENIAL = re.compile(r"\b(?:not|never|neither|nor|cannot|wrong|incorrect)\b|n't\b", re.IGNORECASE)
_PASSED_OVER = re.compile(r"\b(?:no|rather than|instead of)\b", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_OPEN_BEFORE = re.compile(r"(?:[+*/×÷^]|\bx|\bor|[0-9\s]-)\s*$", re.IGNORECASE)
_OPEN_AFTER = re.compile(r"\s*(?:or\b|[+*/×÷-]\s*[0-9])", re.IGNORECASE)
_FENCE = re.compile(r"```(?:[a-z]+\n)?|\*\*", re.IGNORECASE)
_QUOTED = re.compile(r"`([^`\n]+)`|'([^'\n]*)'|\"([^\"\n]*)\"")
_LIST = re.compile(r"\[[^\[\]\n]*\]")


def score(items: Sequence[Item], answers: Sequence[str]) -> list[ItemScore]:
    """1 for a right answer, else 0, with the extracted answer."""
    return [_score(item.target, answer) for item, answer in zip(items, answers, strict=True)]


def canonical(target: Mapping[str, Any]) -> str:
    """The work, if any, and the right answer, as a model should write them."""
    if target["kind"] == "call":
        return json.dumps(target["answer"])
    closing = f"\nOutput: {target['answer']}" if target["kind"] == "output" else f" Answer: {target['answer']}"
    return f"{target.get('work', '')}{closing}".lstrip()


def _score(target: Mapping[str, Any], text: str) -> ItemScore:
    kind, right = target["kind"], target["answer"]
    text = text.replace("’", "'").replace("−", "-")
    if kind == "call":
        call, problem = read_object(text)
        if call is None:
            return ItemScore(0.0, None, problem)
        return ItemScore(float(same(call, right)), json.dumps(call))
    if kind == "word":
        word = read_word(text, target["among"])
        return ItemScore(float(word is not None and word.lower() == right.lower()), word)
    if kind == "number":
        number = read_number(text)
        return ItemScore(float(number is not None and Decimal(number) == Decimal(right)), number)
    output = read_output(text, right)
    return ItemScore(float(output == right), output)


def _marked(text: str) -> str | None:
    """The line after the last "Answer:"; None where there is no such marker."""
    ends = [each.end() for each in _MARKER.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] :].strip(" \t\r\n*:")
    return rest.splitlines()[0] if rest else ""


def _denied(text: str, start: int, end: int) -> bool:
    """Whether the clause around a mention denies it ("no it does not" does not deny `no`)."""
    before, after = _CLAUSE.split(text[:start])[-1], _CLAUSE.split(text[end:])[0]
    after = "" if text[start:end].lower() in ("yes", "no") else after
    return bool(_DENIAL.search(before) or _PASSED_OVER.search(before) or _DENIAL.search(after))


def read_word(text: str, among: Sequence[str]) -> str | None:
    """The word of `among` that a text gives as its answer, ignoring case; None where there is none, or more than one."""

    def mentions(part: str) -> set[str]:
        return {
            word
            for word in among
            for match in re.finditer(rf"(?<![\w-]){re.escape(word)}(?![\w-])", part, re.IGNORECASE)
            if not _denied(part, *match.span())
        }

    marked = _marked(text)
    sentences = [each for each in _SENTENCE.split(text.strip()) if each]
    parts = [marked] if marked is not None else [text, *sentences[-1:]]
    for part in parts:
        words = mentions(part)
        if len(words) == 1:
            return words.pop()
    return None


def read_number(text: str) -> str | None:
    """The number that a text gives as its answer, without separators; None where there is none, or more than one."""
    marked = _marked(text)
    part = text if marked is None else marked.rsplit("=", 1)[-1]
    if marked is not None:
        bare = re.sub(r"\([^()]*\)", "", part)
        part = bare if _NUMBER.search(bare) else part
    matches = list(_NUMBER.finditer(part))
    if not matches or _denied(part, *matches[-1].span()) or _OPEN_BEFORE.search(part[: matches[-1].start()]):
        return None
    numbers = [_plain(match.group()) for match in matches]
    return numbers[-1] if marked is None or len(set(numbers)) == 1 else None


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "")


def read_output(text: str, right: str) -> str | None:
    """The output that a text gives for a program, in the form of `right` (a list, an integer, or other text); None if unclear.

    It is looked for in the first line, or directly after the first "Output:".
    """
    text = _FENCE.sub("", text).strip()
    marker = _OUTPUT.search(text) or _PRINTS.search(text)
    rest = (text if marker is None else _ANNOUNCED.sub("", text[marker.end() :])).strip()
    if not rest or _DENIAL.match(rest):
        return None
    line = rest.splitlines()[0].strip()
    if right.startswith("["):
        lists = {re.sub(r"\s*,\s*", ", ", each) for each in _LIST.findall(line)}
        return lists.pop() if len(lists) == 1 else None
    if re.fullmatch(r"-?[0-9]+", right):
        line = line.lstrip("`'\"")
        first = _NUMBER.match(line)
        return _plain(first.group()) if first and not _OPEN_AFTER.match(line[first.end() :]) else read_number(line)
    quoted = _QUOTED.match(line)
    return quoted.group(quoted.lastindex or 0) if quoted else line.strip("`'\" ").rstrip(".").strip("`'\" ")


def read_object(text: str) -> tuple[dict[str, Any] | None, str | None]:
    """The one JSON object in a text, whatever surrounds it; else None and the reason."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
    objects: list[dict[str, Any]] = []
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            objects.append(value)
        start = text.find("{", end)
    if not objects:
        return None, "no JSON object"
    if any(not same(each, objects[0]) for each in objects):
        return None, f"{len(objects)} JSON objects that differ"
    return objects[0], None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def same(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal: strings ignoring case, 5 as 5.0, but no number equals a boolean or a string."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, str) and isinstance(right, str):
        return left.strip().casefold() == right.strip().casefold()
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)
