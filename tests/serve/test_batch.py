"""Batches: every request is answered once, as the server answers it, whatever stops the job."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unmask.engine.engine import Engine, Update
from unmask.engine.llm import LanguageModel
from unmask.errors import DataError, RoomError, TrainingError
from unmask.serve import batch as batches
from unmask.serve.batch import run_batch as run_checked_batch
from unmask.serve.batch_file import BatchAnswers, BatchCounts, BatchFile
from unmask.serve.config import ServerConfig

COUNT = 7
CONFIG = ServerConfig(names=("tiny",), max_concurrent=3)


def run_batch(model: LanguageModel, requests: Path, out: Path, config: ServerConfig, **options: Any) -> BatchCounts:
    return run_checked_batch(model, BatchFile.read(requests), out, config, **options)


def line(number: int, **body: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "prompt": f"say {number}", "max_tokens": 5, "temperature": 0, **body}
    return {"custom_id": f"request {number}", "method": "POST", "url": "/v1/completions", "body": asked}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def read(path: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(text) for text in path.read_text().splitlines()]
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records), "answered twice"
    return found


def stop_after(count: int) -> tuple[Callable[[BatchCounts], None], Callable[[], bool]]:
    """Progress and question of a job that stops when so many are answered."""
    seen = [0]

    def on_progress(counts: BatchCounts) -> None:
        seen[0] = counts.done

    return on_progress, lambda: seen[0] >= count


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    return write(tmp_path / "requests.jsonl", [line(number) for number in range(COUNT)])


def test_answers_are_the_models_own(tiny: LanguageModel, requests: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert run_batch(tiny, requests, out, CONFIG) == BatchCounts(COUNT, COUNT, 0)
    for number, record in enumerate(read(out)[f"request {number}"] for number in range(COUNT)):
        ids = tiny.encode_prompt(f"say {number}", chat=False)
        answer = tiny.complete(ids, max_new_tokens=5, temperature=0.0)
        response = record["response"]
        assert (response["status_code"], record["error"]) == (200, None)
        assert response["body"]["choices"][0]["text"] == answer.text
        assert response["body"]["usage"]["completion_tokens"] == len(answer.ids)
        assert response["request_id"]


def test_a_stopped_and_torn_job_goes_on(tiny: LanguageModel, requests: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    run_batch(tiny, requests, whole, CONFIG)
    on_progress, should_stop = stop_after(2)
    one = ServerConfig(names=("tiny",), max_concurrent=1)
    counts = run_batch(tiny, requests, out, one, on_progress=on_progress, should_stop=should_stop)
    assert 2 <= counts.done < COUNT
    os.truncate(out, out.stat().st_size - 3)
    asked: list[int] = []
    counts = run_batch(tiny, requests, out, CONFIG, on_progress=lambda counts: asked.append(counts.done))
    assert counts == BatchCounts(COUNT, COUNT, 0)
    assert asked[0] >= 1, "what was answered is not asked again"
    bodies = [{key: each["response"]["body"]["choices"] for key, each in read(path).items()} for path in (out, whole)]
    assert bodies[0] == bodies[1]


def test_a_request_that_the_server_refuses_has_its_error(tiny: LanguageModel, tmp_path: Path) -> None:
    lines = [line(0), line(1, max_tokens=-1), line(2, model="another"), line(3, stream=True)]
    chat = {"custom_id": "chat", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "hi"}]}}
    chat["body"] |= {"max_tokens": 3}  # type: ignore[operator]
    out = tmp_path / "answers.jsonl"
    counts = run_batch(tiny, write(tmp_path / "requests.jsonl", [*lines, chat]), out, CONFIG)
    assert counts == BatchCounts(5, 5, 3)
    found = read(out)
    status = {key: record["response"]["status_code"] for key, record in found.items()}
    assert status == {"request 0": 200, "request 1": 400, "request 2": 404, "request 3": 400, "chat": 200}
    assert "max_tokens" in found["request 1"]["response"]["body"]["error"]["message"]
    assert found["request 3"]["response"]["body"]["error"]["param"] == "stream"


def test_tokens_are_counted_in_every_form_and_again_when_the_file_is_read(tiny: LanguageModel, tmp_path: Path) -> None:
    say, prompt = (
        [{"role": "user", "content": "Hello"}],
        {"prompt": "A prompt of some tokens, of which a block is cached", "n": 2},
    )
    asked = [
        ("/v1/completions", {**prompt, "max_tokens": 5}),
        ("/v1/completions", {**prompt, "max_tokens": 5}),
        ("/v1/completions", {"prompt": 3}),
        ("/v1/chat/completions", {"messages": say, "max_tokens": 3}),
        ("/v1/messages", {"messages": say, "max_tokens": 4}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
        ("/infill", {"input_prefix": "One", "n_predict": 6}),
    ]
    lines = [{"custom_id": f"{i}", "url": url, "body": {"ignore_eos": True, **body}} for i, (url, body) in enumerate(asked)]
    out = tmp_path / "answers.jsonl"
    one = ServerConfig(names=("tiny",), max_concurrent=1)
    assert run_batch(tiny, write(tmp_path / "requests.jsonl", lines), out, one) == BatchCounts(7, 7, 1)
    answers = BatchAnswers(out)
    answers.close()
    encoded = [len(tiny.encode_prompt(prompt["prompt"], chat=False)), len(tiny.encode_chat(say))]
    num_infill = read(out)["6"]["response"]["body"]["tokens_evaluated"]
    assert answers.usage.input_tokens == 2 * encoded[0] + 3 * encoded[1] + num_infill
    assert answers.usage.output_tokens == 2 * 2 * 5 + 3 + 4 + 16 + 6
    assert answers.usage.cached_tokens >= 8


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1"),
        (json.dumps({**line(0), "custom_id": 3}), "custom_id is 3"),
        (json.dumps({**line(0), "url": "/v1/embeddings"}), "/v1/embeddings"),
        (json.dumps({**line(0), "method": "GET"}), "GET"),
        (json.dumps({**line(0), "body": None}), "body is None"),
        (f"{json.dumps(line(0))}\n\n{json.dumps(line(0))}", "line 3: custom_id 'request 0'"),
        ("\udcff", "UTF-8"),
        ("\n", "holds no request"),
    ],
)
def test_a_file_that_is_no_batch_is_refused(tiny: LanguageModel, tmp_path: Path, text: str, named: str) -> None:
    requests, out = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=named):
        run_batch(tiny, requests, out, CONFIG)
    assert not out.exists()


def test_no_request_ends_the_batch(tiny: LanguageModel, tmp_path: Path) -> None:
    """What JSON allows and clients refuse to send: NaN, and half of a surrogate pair."""
    half = "\ud83d"
    lines = [line(0, temperature=float("nan")), line(1, prompt=half), {**line(2), "custom_id": half}]
    out = tmp_path / "answers.jsonl"
    assert run_batch(tiny, write(tmp_path / "requests.jsonl", lines), out, CONFIG).done == 3
    found = read(out)
    assert found["request 0"]["response"]["status_code"] == 400
    assert found[half]["response"]["status_code"] == 200


def test_a_failure_of_the_application_answers_one_request(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LanguageModel, prompt: str, **options: Any) -> list[int]:
        if prompt == "say 1":
            raise RuntimeError("a defect")
        return encode(self, prompt, **options)

    encode = LanguageModel.encode_prompt
    monkeypatch.setattr(LanguageModel, "encode_prompt", fail)
    out = tmp_path / "answers.jsonl"
    counts = run_batch(tiny, write(tmp_path / "requests.jsonl", [line(0), line(1), line(2)]), out, CONFIG)
    assert counts == BatchCounts(3, 3, 1)
    first = read(out)
    assert first["request 1"]["response"]["status_code"] == 500
    monkeypatch.undo()
    asked: list[BatchCounts] = []
    resumed = run_batch(tiny, tmp_path / "requests.jsonl", out, CONFIG, on_progress=asked.append)
    assert (asked[0], resumed) == (BatchCounts(3, 2, 0), BatchCounts(3, 3, 0)), "what the server failed at is asked again"
    again = read(out)
    assert again["request 1"]["response"]["status_code"] == 200
    assert all(again[name] == first[name] for name in ("request 0", "request 2"))


class Unready(LanguageModel):
    """A model whose engine cannot be made, or is not made in time."""

    seconds: float

    def engine(self, **options: Any) -> Engine:
        if self.seconds:
            time.sleep(self.seconds)
            return super().engine(**options)
        raise RoomError("the KV cache needs more memory than there is")


@pytest.mark.parametrize(("seconds", "error"), [(0.0, RoomError), (0.4, TrainingError)])
def test_an_engine_that_does_not_get_ready_ends_the_batch(
    tiny: LanguageModel, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, error: type[Exception]
) -> None:
    monkeypatch.setattr(batches, "READY_SECONDS", 0.1 if error is TrainingError else 60.0)
    model = Unready(tiny.transformer, tiny.tokenizer, name="tiny")
    model.seconds = seconds
    with pytest.raises(error):
        run_batch(model, requests, tmp_path / "answers.jsonl", CONFIG)
    assert not (tmp_path / "answers.jsonl").exists()


def test_what_comes_while_the_engine_is_replaced_waits_for_the_next(
    tiny: LanguageModel, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, made = Engine.step, LanguageModel.engine
    failing = [RuntimeError("a defect")]

    def fail_once(engine: Engine) -> list[Update]:
        if failing:
            raise failing.pop()
        return step(engine)

    def slow(model: LanguageModel, **options: Any) -> Engine:
        time.sleep(0.05)
        return made(model, **options)

    monkeypatch.setattr(Engine, "step", fail_once)
    monkeypatch.setattr(LanguageModel, "engine", slow)
    counts = run_batch(tiny, requests, tmp_path / "answers.jsonl", CONFIG)
    assert counts.done == COUNT
    statuses = {record["response"]["status_code"] for record in read(tmp_path / "answers.jsonl").values()}
    assert statuses <= {200, 500}
    assert counts.failed <= CONFIG.max_concurrent * batches.WAITING, "only what the engine had"


def test_two_jobs_do_not_write_the_same_answers(tiny: LanguageModel, requests: Path, tmp_path: Path) -> None:
    answers = BatchAnswers(tmp_path / "answers.jsonl")
    with pytest.raises(DataError, match="another job"):
        run_batch(tiny, requests, tmp_path / "answers.jsonl", CONFIG)
    answers.close()
    assert run_batch(tiny, requests, tmp_path / "answers.jsonl", CONFIG).failed == 0


def test_answers_of_other_requests_are_refused(tiny: LanguageModel, requests: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    run_batch(tiny, requests, out, CONFIG)
    others = write(tmp_path / "others.jsonl", [line(1)])
    with pytest.raises(DataError, match="request 0"):
        run_batch(tiny, others, out, CONFIG)
    with pytest.raises(DataError, match="line 1: not an answer"):
        run_batch(tiny, requests, requests, CONFIG)


@pytest.mark.parametrize("content", ["a note without an end of line", '{"id": "something else"'])
def test_a_file_of_something_else_keeps_its_last_line(
    tiny: LanguageModel, requests: Path, tmp_path: Path, content: str
) -> None:
    out = tmp_path / "note.txt"
    out.write_text(content)
    with pytest.raises(DataError, match="line 1: not an answer"):
        run_batch(tiny, requests, out, CONFIG)
    assert out.read_text() == content
