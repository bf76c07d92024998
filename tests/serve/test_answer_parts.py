"""Parts of an answer: their order, and the events of their growth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from unmask.engine.request import TokenLogprob
from unmask.serve.api.answer_parts import AnswerParts
from unmask.serve.choice import ChoiceDelta
from unmask.serve.protocol.messages import CalledFunction, ToolCall

CALLS = [ToolCall(id=name, function=CalledFunction(name=name, arguments="")) for name in "ab"]


def _delta(text: str = "", *calls: tuple[int, str, bool], logprobs: tuple[int, ...] = ()) -> ChoiceDelta:
    """`calls` are index, arguments, and whether the call begins."""
    made: list[dict[str, Any]] = []
    for index, arguments, begins in calls:
        call = {"index": index, "function": {"arguments": arguments}}
        made.append({"id": CALLS[index].id, **call} if begins else call)
    return ChoiceDelta(text, made, tuple(TokenLogprob(token, -1.0) for token in logprobs))


def _parts(*deltas: ChoiceDelta, reason: str) -> tuple[AnswerParts, list[tuple[str, int, str]]]:
    parts, events = AnswerParts(), []
    for delta in deltas:
        completion = SimpleNamespace(finish_reason=reason) if delta is deltas[-1] else None
        choice: Any = SimpleNamespace(tool_calls=CALLS, completion=completion)
        events += [(event.kind, event.part.index, event.text) for event in parts.take(choice, delta)]
    return parts, events


def test_parts_follow_each_other() -> None:
    parts, events = _parts(
        _delta("I "),
        _delta("call.", (0, "", True), (0, "{", False)),
        _delta("", (0, "}", False), (1, "", True)),
        _delta("", (1, "{}", False)),
        _delta("Done."),
        reason="stop",
    )
    expected = [("I call.", None), ("{}", "a"), ("{}", "b"), ("Done.", None)]
    assert [(part.text, part.call and part.call.id) for part in parts.parts] == expected
    assert all(part.is_complete for part in parts.parts)
    for index, (text, _) in enumerate(expected):
        of_part = [event for event in events if event[1] == index]
        assert [kind for kind, _, _ in of_part] == ["begin", *["delta"] * (len(of_part) - 2), "end"]
        assert "".join(added for _, _, added in of_part) == text
    assert [index for _, index, _ in events] == sorted(index for _, index, _ in events)


def test_what_breaks_off_is_not_complete() -> None:
    parts, _ = _parts(_delta("Well", (0, "", True), (0, '{"a', False)), reason="length")
    assert [part.is_complete for part in parts.parts] == [True, False]
    assert _parts(_delta(), reason="stop")[1] == []


def test_log_probabilities_go_with_the_text_that_they_are_of() -> None:
    parts, _ = _parts(
        _delta(logprobs=(1,)), _delta("é", logprobs=(2,)), _delta("", (0, "{}", True), logprobs=(3,)), reason="stop"
    )
    assert [[entry.token for entry in part.logprobs] for part in parts.parts] == [[1, 2], []]
