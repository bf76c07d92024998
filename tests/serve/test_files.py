"""Files and batches, by OpenAI's client: every request is answered once, nobody sees another's, clients come first."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from asking import HTTP, connect
from live import Live, SlowModel, live
from openai import OpenAI
from wire import Wire, request_bytes

from helpers import soon
from unmask.engine.llm import LanguageModel
from unmask.serve import batch_runner
from unmask.serve.batch_file import BatchAnswers
from unmask.serve.clients import Clients
from unmask.serve.config import ServerConfig
from unmask.serve.keys import plain_key

ENDPOINT = "/v1/completions"
ENDED = ("completed", "failed", "cancelled", "expired")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(batch_runner, "_COUNT_SECONDS", 0.0)


@pytest.fixture(scope="module")
def archive(tiny: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that keeps files, for two keys."""
    folder = tmp_path_factory.mktemp("files")
    config = ServerConfig(api_keys=("first", "second"), files=folder, max_file=100_000, max_stored=300_000)
    with live(tiny, config) as running:
        yield running
        running.wait_idle()


@pytest.fixture
def first(archive: Live) -> Iterator[OpenAI]:
    with connect(archive.url, api_key="first") as client:
        yield client


def lines(count: int, **body: Any) -> bytes:
    fields = {"max_tokens": 4, "temperature": 0, **body}
    asked = [
        {"custom_id": f"id {i}", "method": "POST", "url": ENDPOINT, "body": {"prompt": f"say {i}", **fields}}
        for i in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in asked)


def upload(client: OpenAI, content: bytes, **fields: Any) -> str:
    return client.files.create(file=("requests.jsonl", content), purpose="batch", **fields).id


def start(client: OpenAI, content: bytes, window: Any = "24h", **fields: Any) -> str:
    file_id = upload(client, content)
    return client.batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window=window, **fields).id


def ended(client: OpenAI, id_: str) -> Any:
    soon(lambda: client.batches.retrieve(id_).status in ENDED)
    return client.batches.retrieve(id_)


def records(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    assert file_id is not None
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found), "answered twice"
    return by_id


def test_a_batch_from_upload_to_answers(first: OpenAI, tiny: LanguageModel) -> None:
    wrong = b'{"custom_id": "wrong", "url": "/v1/completions", "body": {"prompt": 3}}\n'
    id_ = start(first, lines(5) + wrong, metadata={"job": "nightly"})
    batch = ended(first, id_)
    assert (batch.status, batch.endpoint, batch.metadata, batch.model) == ("completed", ENDPOINT, {"job": "nightly"}, "tiny")
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (6, 5, 1)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times)
    answers = records(first, batch.output_file_id)
    assert set(answers) == {f"id {i}" for i in range(5)}
    for i in range(5):
        alone = tiny.complete(tiny.encode_prompt(f"say {i}", chat=False), max_new_tokens=4, temperature=0.0)
        assert answers[f"id {i}"]["response"]["body"]["choices"][0]["text"] == alone.text
    assert usage_of(batch) == used(answers)
    errors = records(first, batch.error_file_id)
    assert errors["wrong"]["response"]["status_code"] == 400
    assert first.batches.list(limit=1).data[0].id == id_
    for file_id in (batch.input_file_id, batch.output_file_id, batch.error_file_id):
        assert first.files.delete(file_id).deleted
        with pytest.raises(openai.NotFoundError):
            first.files.content(file_id)


def used(answers: dict[str, dict[str, Any]]) -> tuple[int, int, int]:
    """Tokens of prompts, cached tokens and tokens of completions of these answers."""
    usages = [record["response"]["body"]["usage"] for record in answers.values()]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    return sum(usage["prompt_tokens"] for usage in usages), cached, sum(usage["completion_tokens"] for usage in usages)


def usage_of(batch: Any) -> tuple[int, int, int]:
    """The same by OpenAI's object."""
    usage = batch.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    return usage.input_tokens, usage.input_tokens_details.cached_tokens, usage.output_tokens


def test_files_are_listed_in_pages(first: OpenAI) -> None:
    ids = [upload(first, lines(i + 1)) for i in range(3)]
    stored = first.files.retrieve(ids[0])
    assert (stored.filename, stored.purpose, stored.bytes, stored.status) == (
        "requests.jsonl",
        "batch",
        len(lines(1)),
        "processed",
    )
    assert [each.id for each in first.files.list(limit=1, purpose="batch")][:3] == ids[::-1], "pages, newest first"
    assert [each.id for each in first.files.list(order="asc", after=ids[0])] == ids[1:]
    assert first.files.list(purpose="assistants").data == []
    with pytest.raises(openai.BadRequestError, match="after"):
        first.files.list(after="file-nowhere")
    for id_ in ids:
        first.files.delete(id_)


def test_nobody_sees_what_is_anothers(archive: Live, first: OpenAI) -> None:
    id_ = start(first, lines(1))
    batch = ended(first, id_)
    with connect(archive.url, api_key="second") as second:
        assert second.files.list().data == []
        assert second.batches.list().data == []
        calls = [second.files.retrieve, second.files.content, second.files.delete]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                call(batch.output_file_id)
        for call in (second.batches.retrieve, second.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(id_)
        with pytest.raises(openai.NotFoundError):
            second.batches.create(input_file_id=batch.input_file_id, endpoint=ENDPOINT, completion_window="24h")
        answer = first.responses.create(model="tiny", input="Hi", max_output_tokens=16)
        assert first.responses.retrieve(answer.id).id == answer.id
        with pytest.raises(openai.NotFoundError):
            second.responses.retrieve(answer.id)
        with pytest.raises(openai.BadRequestError, match="not stored"):
            second.responses.create(model="tiny", input="Hi", previous_response_id=answer.id)
    assert len(first.files.list().data) == 2


@pytest.mark.parametrize(
    ("content", "line", "named"),
    [
        (lines(1) + b"{\n", 2, "not JSON"),
        (lines(1) + lines(1), 2, "twice"),
        (lines(1).replace(b"/v1/completions", b"/v1/chat/completions"), 1, "endpoint"),
        (b"\n", None, "no request"),
    ],
)
def test_a_file_that_is_no_batch_fails(first: OpenAI, content: bytes, line: int | None, named: str) -> None:
    batch = ended(first, start(first, content))
    (error,) = batch.errors.data
    assert (batch.status, error.line) == ("failed", line)
    assert named in error.message
    assert "requests.jsonl" in error.message
    assert batch.output_file_id is None


def test_a_server_that_ends_leaves_the_rest_to_the_next(tiny: LanguageModel, tmp_path: Path) -> None:
    slow = SlowModel(tiny.transformer, tiny.tokenizer, name="tiny")
    slow.seconds = 0.01
    config = ServerConfig(files=tmp_path, max_concurrent=2, shutdown_grace=60)
    with live(slow, config) as running, connect(running.url) as client:
        id_ = start(client, lines(12))
        soon(lambda: client.batches.retrieve(id_).request_counts.completed >= 2)
        with pytest.raises(openai.BadRequestError, match="asks"):
            client.files.delete(client.batches.retrieve(id_).input_file_id)
        begun = time.monotonic()
    assert time.monotonic() - begun < 10, "the server does not wait for batches"
    answered = (tmp_path / "answers" / f"{id_}.jsonl").read_bytes().splitlines()
    assert 2 <= len(answered) < 12
    # A torn line, and an answer that the server failed at, as a process leaves them that was killed.
    failed = json.loads(answered[0])
    failed["response"]["status_code"] = 500
    broken = [json.dumps(failed).encode(), *answered[1:]]
    (tmp_path / "answers" / f"{id_}.jsonl").write_bytes(b"\n".join(broken) + b'\n{"id": "batch_req_')
    with live(tiny, config) as running, connect(running.url) as client:
        batch = ended(client, id_)
        found = records(client, batch.output_file_id)
        assert (batch.status, batch.request_counts.completed, len(found)) == ("completed", 12, 12)
        assert all(found[json.loads(line)["custom_id"]] == json.loads(line) for line in answered[1:])
        assert usage_of(batch) == used(found)
        assert list((tmp_path / "answers").iterdir()) == []


def test_two_servers_of_one_folder_share_its_batches(tiny: LanguageModel, tmp_path: Path) -> None:
    config = ServerConfig(files=tmp_path)
    with live(tiny, config) as one, live(tiny, config) as other, connect(one.url) as client, connect(other.url) as reader:
        ids = [start(client, lines(3)) for _ in range(2)]
        for id_ in ids:
            assert len(records(reader, ended(reader, id_).output_file_id)) == 3


def test_cancelled_batches_keep_what_was_answered(tiny: LanguageModel, tmp_path: Path) -> None:
    slow = SlowModel(tiny.transformer, tiny.tokenizer, name="tiny")
    slow.seconds = 0.01
    with live(slow, ServerConfig(files=tmp_path, max_concurrent=2)) as running, connect(running.url) as client:
        id_ = start(client, lines(50))
        soon(lambda: client.batches.retrieve(id_).request_counts.completed >= 1)
        assert client.batches.cancel(id_).status in ("cancelling", "cancelled")
        batch = ended(client, id_)
        assert batch.status == "cancelled"
        found = records(client, batch.output_file_id)
        assert 1 <= len(found) == batch.request_counts.completed < batch.request_counts.total == 50
        assert usage_of(batch) == used(found)
        assert batch.error_file_id is None
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            client.batches.cancel(id_)


def test_what_the_window_has_no_time_for_expires(tiny: LanguageModel, tmp_path: Path) -> None:
    slow = SlowModel(tiny.transformer, tiny.tokenizer, name="tiny")
    slow.seconds = 0.05
    with live(slow, ServerConfig(files=tmp_path, max_concurrent=2)) as running, connect(running.url) as client:
        batch = ended(client, start(client, lines(200), window="1s"))
        assert batch.status == "expired"
        errors = records(client, batch.error_file_id)
        assert all(each["error"]["code"] == "batch_expired" and each["response"] is None for each in errors.values())
        answered = records(client, batch.output_file_id) if batch.output_file_id else {}
        assert len(errors) + len(answered) == 200


def test_clients_come_before_batches(tiny: LanguageModel, tmp_path: Path) -> None:
    slow = SlowModel(tiny.transformer, tiny.tokenizer, name="tiny")
    slow.seconds = 0.005
    with (
        live(slow, ServerConfig(files=tmp_path, max_concurrent=4, max_queue=0, timeout=5)) as running,
        connect(running.url) as client,
    ):
        id_ = start(client, lines(100))
        soon(lambda: running.worker.num_background == 3)
        seen = 0
        for i in range(2):
            asked = client.completions.create(
                model="tiny", prompt=f"now {i}", max_tokens=24, extra_body={"diffusion": {"min_new_tokens": 24}}
            )
            assert asked.diffusion["queue_seconds"] < 1
            seen = max(seen, running.worker.num_background)
        assert seen <= 3, "a place is left for clients"
        assert client.batches.retrieve(id_).status == "in_progress"
        client.batches.cancel(id_)


def test_batches_of_a_key_that_is_gone_wait_for_it(tiny: LanguageModel, tmp_path: Path) -> None:
    keys = ServerConfig(api_keys=("first",), files=tmp_path)
    with live(tiny, keys) as running, connect(running.url, api_key="first") as client:
        ended(client, start(client, lines(1)))
        database = sqlite3.connect(tmp_path / "state.sqlite3")
        with database:
            database.execute("UPDATE batches SET owner = 'nobody', status = 'validating'")
        time.sleep(0.2)
        assert database.execute("SELECT status FROM batches").fetchone() == ("validating",)
        database.close()


def test_a_batch_whose_key_is_taken_away_stops_until_it_is_back(tiny: LanguageModel, tmp_path: Path) -> None:
    slow = SlowModel(tiny.transformer, tiny.tokenizer, name="tiny")
    slow.seconds = 0.01
    keys = plain_key("first"), plain_key("second")
    config = ServerConfig(api_keys=("first", "second"), files=tmp_path, max_concurrent=4)
    with live(slow, config) as running, connect(running.url, api_key="first") as client:
        id_ = start(client, lines(16))
        soon(lambda: client.batches.retrieve(id_).request_counts.completed >= 1)
        clients: Clients = running.app.state.clients
        clients.replace(keys[1:])
        soon(lambda: not running.app.state.batches._running)
        with pytest.raises(openai.AuthenticationError):
            client.batches.retrieve(id_)
        clients.replace(keys)
        batch = client.batches.retrieve(id_)
        assert (batch.status, batch.request_counts.completed < 16) == ("in_progress", True)
        slow.seconds = 0.0
        assert len(records(client, ended(client, id_).output_file_id)) == 16


def test_without_a_folder_the_routes_say_so(site: Live, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        upload(client, lines(1))
    assert caught.value.code == "no_files"
    with pytest.raises(openai.NotFoundError, match="files"):
        client.batches.list()


# Uploads


def form(
    content: bytes, *, name: bytes = b'name="file"; filename="a.jsonl"', purpose: bytes = b"batch", end: bytes = b"--"
) -> bytes:
    parts = [(b'name="purpose"', purpose), (name, content)]
    return b"".join(
        b"--edge\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + body + b"\r\n" for head, body in parts
    ) + (b"--edge" + end + b"\r\n")


FORM = "multipart/form-data; boundary=edge"


@pytest.mark.parametrize(
    ("content_type", "body", "status", "named"),
    [
        (FORM, form(b"x" * 100_001), 413, "100000 bytes"),
        (FORM, form(b"x" * 400_000), 413, "larger"),
        ("application/json", b"{}", 415, "multipart/form-data"),
        (FORM, form(b"x", purpose=b"assistants"), 400, "purpose"),
        (FORM, form(b"x", purpose=b"x" * 5000), 400, "purpose"),
        (FORM, form(b"x", name=b'name="file"'), 400, "file"),
        (FORM, form(b"x", name=b'name="other"'), 400, "file"),
        (FORM, b"", 400, "form"),
        (FORM, form(b"x", end=b""), 400, "form"),
        (FORM, b"nonsense", 400, "form"),
        (FORM, form(b"x")[:40], 400, "form"),
        (FORM, form(b"x", name=b"a" * 9000), 400, "form"),
        (FORM, b"".join(form(b"x", end=b"")[:-10] for _ in range(20)), 400, ""),
        ("multipart/form-data", form(b"x"), 400, "form"),
        ("multipart/form-data; boundary=" + "e" * 300, form(b"x"), 400, "form"),
    ],
)
def test_broken_uploads(archive: Live, content_type: str, body: bytes, status: int, named: str) -> None:
    headers = {"content-type": content_type, "authorization": "Bearer first"}
    answer = HTTP.post(f"{archive.url}/v1/files", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert named in answer.json()["error"]["message"]
    assert not uploading(archive)


def test_a_chunked_upload_counts_against_the_limit(archive: Live) -> None:
    headers = {"content-type": FORM, "authorization": "Bearer first"}
    answer = HTTP.post(f"{archive.url}/v1/files", content=iter([form(b"x" * 100_001)]), headers=headers)
    assert answer.status_code == 413
    answer = HTTP.post(f"{archive.url}/v1/files", content=iter([form(b"x" * 100_000)]), headers=headers)
    assert answer.json()["bytes"] == 100_000
    assert HTTP.delete(f"{archive.url}/v1/files/{answer.json()['id']}", headers=headers).json()["deleted"]


def test_all_files_together_have_a_bound(archive: Live, first: OpenAI) -> None:
    content, ids = b"x" * 90_000, list[str]()
    while archive.app.state.files.room >= len(form(content)):
        ids.append(upload(first, content))
    assert len(ids) == 3
    with pytest.raises(openai.APIStatusError) as caught:
        upload(first, content)
    assert (caught.value.status_code, caught.value.code) == (413, "storage_full")
    for id_ in ids:
        first.files.delete(id_)
    first.files.delete(upload(first, content))


def test_an_upload_that_breaks_off_leaves_nothing(archive: Live) -> None:
    body = form(b"x" * 50_000)
    with Wire(archive.url) as wire:
        wire.send(request_bytes(body, "/v1/files", content_type=FORM, authorization="Bearer first")[:-10_000])
        soon(lambda: uploading(archive))
    soon(lambda: not uploading(archive))


def uploading(it: Live) -> list[Path]:
    folder = it.app.state.unmask.config.files
    return list((folder / "content").glob(".uploading-*"))


def test_a_file_is_forgotten_when_it_expires(archive: Live, first: OpenAI) -> None:
    file_id = upload(first, lines(1), expires_after={"anchor": "created_at", "seconds": 3600})
    stored = first.files.retrieve(file_id)
    assert stored.expires_at == stored.created_at + 3600
    database = sqlite3.connect(archive.app.state.unmask.config.files / "state.sqlite3")
    with database:
        database.execute("UPDATE files SET expires_at = 1 WHERE id = ?", (file_id,))
    database.close()
    with pytest.raises(openai.NotFoundError):
        first.files.retrieve(file_id)
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        upload(first, lines(1), expires_after={"anchor": "created_at", "seconds": 5})


@pytest.mark.parametrize(
    "fields",
    [{"endpoint": "/v1/embeddings"}, {"completion_window": "soon"}, {"metadata": {"a": "b" * 600}}, {"input_file_id": 3}],
)
def test_a_batch_that_cannot_be(archive: Live, fields: dict[str, Any]) -> None:
    body = {"input_file_id": "file-x", "endpoint": ENDPOINT, "completion_window": "24h", **fields}
    answer = HTTP.post(f"{archive.url}/v1/batches", json=body, headers={"authorization": "Bearer first"})
    assert answer.status_code == 400
    assert next(iter(fields)) in answer.json()["error"]["message"]


def test_curl_needs_no_content_type_where_there_is_no_body(archive: Live) -> None:
    answer = httpx2.post(f"{archive.url}/v1/batches/batch_x/cancel", headers={"authorization": "Bearer first"})
    assert answer.status_code == 404


def test_answers_that_another_process_writes_are_left_to_it(tmp_path: Path) -> None:
    answers = BatchAnswers(tmp_path / "answers.jsonl")
    with pytest.raises(batch_runner.AnswersBusyError):
        BatchAnswers(tmp_path / "answers.jsonl")
    answers.close()


def test_answers_whose_file_is_removed_meanwhile_are_left_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job without an answer removes its file when it ends, perhaps just when another has opened it."""
    path = tmp_path / "answers.jsonl"
    monkeypatch.setattr("fcntl.flock", lambda file, flags: path.unlink())
    with pytest.raises(batch_runner.AnswersBusyError):
        BatchAnswers(path)
