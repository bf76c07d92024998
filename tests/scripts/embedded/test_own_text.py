"""The model's own text: complete, readable by the data loader, and continued after a kill."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import own_text
import pytest
from decoders import EngineDecoder
from own_text import Job, Shards, Writer, chat_job, loops, make_jobs, text_job
from prompts import Prompt

import unmask
from runs import tiny_folder
from unmask.data.encoding import DocumentEncoder
from unmask.data.sources import SourceConfig, open_source
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request

BUDGET = 6
PROMPTS = [Prompt("talk", (f"say {number}",)) for number in range(8)]
CONVERSATION = Prompt("turns", ("Hello, how are you?", "And?", "Thanks."), "user assistant")
TEXT = {"source": "package", "split": "test", "text": "The quick brown fox jumps over.", "prefix": "The quick brown fox"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return unmask.load(tiny_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models write what looks like a loop now and then."""
    monkeypatch.setattr(own_text, "loops", lambda text: False)


def jobs() -> list[Job]:
    return [*map(chat_job, PROMPTS), chat_job(CONVERSATION), text_job(TEXT)]


def write(model: LanguageModel, out: Path, todo: list[Job], tokens: int = 10**9) -> Shards:
    shards = Shards(out)
    for _ in Writer(model, EngineDecoder(model, 3), shards, max_new_tokens=BUDGET).run(todo, tokens):
        pass
    return shards


def read(out: Path) -> dict[str, dict[str, Any]]:
    lines = [line for path in sorted(out.glob("*/*.jsonl")) for line in path.read_text().splitlines()]
    found = {(record := json.loads(line))["id"]: record for line in lines}
    assert len(found) == len(lines), "a prompt was answered twice"
    return found


def test_records_are_what_the_model_says_alone(model: LanguageModel, tmp_path: Path) -> None:
    write(model, tmp_path, jobs())
    found = read(tmp_path)
    assert model.tokenizer is not None
    for job in map(chat_job, PROMPTS):
        record = found[job.id]
        ids = model.encode_chat([{"role": "user", "content": job.turns[0]}])
        answer = model.complete(ids, max_new_tokens=BUDGET, temperature=job.temperature, seed=job.seed)
        assert record["messages"][-1] == {"role": "assistant", "content": model.tokenizer.decode(answer.ids)}
        assert record["tokens"] == len(answer.ids)
        assert record["ended"] == (answer.finish_reason == "stop")
    continued = found[text_job(TEXT).id]
    assert continued["kind"] == "continuation"
    assert continued["prompt"] == TEXT["prefix"]


def test_files_lie_by_split_form_and_temperature(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "SHARD_RECORDS", 5)
    write(model, tmp_path, [*map(chat_job, PROMPTS), text_job(TEXT)])
    drawn = {0.0: "greedy", own_text.SAMPLED_TEMPERATURE: "sampled"}
    assert (tmp_path / "test" / f"text-{drawn[text_job(TEXT).temperature]}-00000.jsonl").exists()
    written = Counter((job.split, drawn[job.temperature]) for job in map(chat_job, PROMPTS))
    assert {way for _, way in written} == {"greedy", "sampled"}
    for (split, way), count in written.items():
        assert len(list((tmp_path / split).glob(f"chat-{way}-*.jsonl"))) == -(-count // 5)


def test_the_data_loader_reads_every_record(model: LanguageModel, tmp_path: Path) -> None:
    write(model, tmp_path, jobs())
    assert model.tokenizer is not None
    for chat in (True, False):
        encoder = DocumentEncoder(model.tokenizer, chat=chat)
        for record in read(tmp_path).values():
            if ("messages" in record) == chat:
                document = encoder.encode(record, "here")
                assert document.maskable.sum() >= record["tokens"] - 1
                assert not document.maskable[0]


def test_a_cut_answer_ends_its_conversation(model: LanguageModel, tmp_path: Path) -> None:
    write(model, tmp_path, [chat_job(CONVERSATION)])
    (record,) = read(tmp_path).values()
    roles = [message["role"] for message in record["messages"]]
    assert roles[0] == "system"
    assert roles[1:] == ["user", "assistant"] * (len(roles[1:]) // 2)
    assert record["ended"] or len(roles) < 7


def test_a_conversation_goes_on_after_a_finished_answer(model: LanguageModel, tmp_path: Path) -> None:
    half = range(0, model.config.vocab_size, 2)

    class Brief(LanguageModel):
        """Every other token ends an answer, but not its first."""

        def request(self, *args: Any, **options: Any) -> Request:
            return super().request(*args, eos_id=half, min_new_tokens=1, **options)

    brief = Brief(model.transformer, model.tokenizer, name="brief")
    write(brief, tmp_path, [chat_job(CONVERSATION)])
    (record,) = read(tmp_path).values()
    users = [message["content"] for message in record["messages"] if message["role"] == "user"]
    assert users == list(CONVERSATION.turns)
    assert record["ended"]
    assert record["tokens"] >= 2 * len(users)


def test_goes_on_after_a_torn_line(model: LanguageModel, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    write(model, whole, jobs())
    write(model, torn, jobs()[:6])
    path = max(torn.glob("train/chat-*.jsonl"))
    os.truncate(path, path.stat().st_size - 9)
    after = write(model, torn, jobs())
    assert read(torn) == read(whole)
    assert after.tokens == sum(record["tokens"] for record in read(whole).values())


def test_stops_at_the_token_target(model: LanguageModel, tmp_path: Path) -> None:
    shards = write(model, tmp_path, jobs(), tokens=2 * BUDGET)
    assert 2 * BUDGET <= shards.tokens <= (2 + 3) * BUDGET
    assert write(model, tmp_path, jobs(), tokens=2 * BUDGET).tokens == shards.tokens


def test_dropped_prompts_are_not_asked_again(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "loops", lambda text: True)
    assert write(model, tmp_path, jobs()).tokens == 0
    monkeypatch.setattr(own_text, "loops", lambda text: False)
    shards = write(model, tmp_path, jobs())
    assert shards.tokens == 0
    assert len(shards.dropped) == len(jobs())


def test_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert own_text.loops("and so on, " * 30)
    assert not loops("The quick brown fox jumps over the lazy dog while five wizards box in the rain.")


def test_jobs_are_mixed_the_same_and_apart() -> None:
    texts = [{**TEXT, "text": f"Text {n} of a book. And more.", "prefix": f"Text {n} of"} for n in range(50)]
    made = make_jobs(100, 3, texts, 0.3)
    assert made == make_jobs(100, 3, texts, 0.3)
    continued = [job for job in made if not job.is_chat]
    assert (len(made), len(continued)) == (100, 30)
    assert {job.temperature for job in made} == {0.0, own_text.SAMPLED_TEMPERATURE}
    prefixes = {job.turns[0] for job in continued}
    asked = [turn for job in made if job.kind == "document" for turn in job.turns]
    assert not any(prefix in turn for prefix in prefixes for turn in asked)


def test_no_two_answers_to_a_prompt_are_sampled_alike() -> None:
    made = make_jobs(400, 3, [], 0.0, answers=4)
    sampled = [(job.id.split("-")[0], job.seed) for job in made if job.temperature > 0]
    assert len(set(sampled)) == len(sampled)
    assert len(made) == len({(job.id.split("-")[0], job.temperature, job.seed if job.temperature else 0) for job in made})


def test_some_prompts_ask_to_be_brief() -> None:
    asked = [chat_job(Prompt("talk", (f"say {number}",))).turns[0] for number in range(400)]
    share = sum(turn.endswith(own_text.HINTS) for turn in asked) / len(asked)
    assert 0.05 < share < 0.25


def test_a_recipe_reads_the_files_as_two_sources(model: LanguageModel, tmp_path: Path) -> None:
    write(model, tmp_path, jobs())
    assert model.tokenizer is not None
    for form, split, chat in (("chat", "train", True), ("text", "test", False)):
        path = str(tmp_path / split / f"{form}-*.jsonl")
        source = open_source(SourceConfig(kind="jsonl", path=path, chat=chat), model.tokenizer, seed=0)
        assert len(source.next_document().tokens) > BUDGET
