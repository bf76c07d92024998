"""`unmask batch`: a killed job goes on, and ends with the answers of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import unmask
from runs import tiny_folder
from unmask.cli.app import app
from unmask.cli.batch import asked_names
from unmask.engine.llm import LanguageModel
from unmask.serve import batch_ray

COUNT = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    return write_requests(tmp_path / "requests.jsonl", COUNT, 20)


def answers(path: Path) -> dict[str, str]:
    records = [json.loads(text) for text in path.read_text().splitlines()]
    found = {record["custom_id"]: record["response"]["body"]["choices"][0]["text"] for record in records}
    assert len(found) == len(records), "answered twice"
    return found


def write_requests(path: Path, count: int, max_tokens: int) -> Path:
    body = {"max_tokens": max_tokens, "temperature": 0}
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": f"say {i}", **body}}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def kill_after(command: list[str], out: Path, num_bytes: int) -> None:
    """Run `unmask` and kill it when its answers have so many bytes."""
    process = subprocess.Popen([sys.executable, "-m", "unmask", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while (not out.exists() or out.stat().st_size < num_bytes) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def command(requests: Path, out: Path, model: Path) -> list[str]:
    return ["batch", str(requests), "--out", str(out), "--model", str(model), "--max-concurrent", "2"]


def test_a_killed_job_ends_with_the_answers_of_one_that_was_not(requests: Path, model: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    kill_after(command(requests, out, model), out, 500)
    resumed = CliRunner().invoke(app, [*command(requests, out, model), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert f"{COUNT} of {COUNT} requests" in resumed.output
    assert CliRunner().invoke(app, command(requests, whole, model)).exit_code == 0
    assert answers(out) == answers(whole)


def test_each_line_names_its_adapter(diffusion_folder: Path, adapter: Path, adapted: LanguageModel, tmp_path: Path) -> None:
    """By the name that the lines themselves give the model."""
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0}
    names = ("mine", "mine:a", "a")
    lines = [{"custom_id": name, "url": "/v1/completions", "body": {"model": name, **body}} for name in names]
    requests, out = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["batch", str(requests), "--out", str(out), "--model", str(diffusion_folder), "--dtype", "float32"]
    assert CliRunner().invoke(app, [*given, "--lora", f"a={adapter}"]).exit_code == 0
    base = unmask.load(diffusion_folder, dtype="float32")
    texts = [model.generate("Hello", chat=False, max_new_tokens=12).text for model in (base, adapted, adapted)]
    assert texts[0] != texts[1]
    assert answers(out) == dict(zip(names, texts, strict=True))


@pytest.mark.parametrize(("lora", "named"), [("a", "NAME=FOLDER"), ("a:b=.", "a:b"), ("a=nosuch", "nosuch")])
def test_a_wrong_adapter_leaves_no_file_behind(requests: Path, model: Path, tmp_path: Path, lora: str, named: str) -> None:
    out = tmp_path / "answers.jsonl"
    refused = CliRunner().invoke(app, [*command(requests, out, model), "--lora", lora])
    assert (refused.exit_code, named in refused.stderr, refused.stderr.count("\n")) == (2, True, 1), refused.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["x:a", "x", "b"], ("x",)),
        (["llama3:8b"], ("llama3:8b",)),
        (["llama3:8b:a"], ("llama3:8b",)),
        (["a", "b"], ()),
        (["x:a", "y"], ()),
    ],
)
def test_the_name_of_the_model_is_what_is_left_of_the_adapters(models: list[str], expected: tuple[str, ...]) -> None:
    assert asked_names(models, ("a=1", "b=2")) == expected


def test_an_existing_file_needs_resume(requests: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.touch()
    result = CliRunner().invoke(app, command(requests, out, model))
    assert result.exit_code == 2
    assert "--resume" in result.output


def test_refused_requests_are_told_by_the_exit_code(model: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": 3, "model": "any"}}\n')
    result = CliRunner().invoke(app, command(requests, tmp_path / "answers.jsonl", model))
    assert result.exit_code == 1
    assert "1 of them with an error" in result.output


@pytest.mark.slow
def test_two_thousand_requests_killed_twice_are_answered_once_each_as_alone(model: Path, tmp_path: Path) -> None:
    count, max_tokens = 2000, 4
    requests, out = write_requests(tmp_path / "requests.jsonl", count, max_tokens), tmp_path / "answers.jsonl"
    sizes = []
    for num_bytes in (150_000, 400_000):
        kill_after([*command(requests, out, model), "--resume"], out, num_bytes)
        sizes.append(out.read_bytes().count(b"\n"))
    assert 0 < sizes[0] < sizes[1] < count
    resumed = CliRunner().invoke(app, [*command(requests, out, model), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    language_model = unmask.load(model)
    expected = {
        str(i): language_model.complete(
            language_model.encode_prompt(f"say {i}", chat=False), max_new_tokens=max_tokens, temperature=0.0
        ).text
        for i in range(count)
    }
    assert answers(out) == expected


def test_ray_is_refused_in_one_line_where_it_is_not_installed(
    requests: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_ray, "find_spec", lambda package: None)
    out = tmp_path / "answers.jsonl"
    refused = CliRunner().invoke(app, [*command(requests, out, model), "--ray", "auto"])
    assert refused.exit_code == 2
    assert "unmask[ray]" in refused.output
    assert not out.exists()
