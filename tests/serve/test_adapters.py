"""LoRA adapters by name: in every API, several at once, loaded and unloaded while requests run, and what is refused."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asking import HTTP
from live import Live, SlowModel, live, served_model

from helpers import make_tokenizer, refused, soon
from lora_folders import folded, write_adapter
from tiny import tiny_model
from unmask.engine.llm import LanguageModel
from unmask.errors import CheckpointError, ConfigError
from unmask.serve.app import create_app
from unmask.serve.config import ServerConfig

PROMPT = list(range(20, 33))
LENGTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: LanguageModel) -> Path:
    """Adapters a, b and c of the model, and one of another."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc", 1):
        write_adapter(tiny.transformer, folder / name, seed=seed)
    write_adapter(tiny_model("llama", vocab_size=tiny.config.vocab_size, hidden_size=16), folder / "other")
    write_adapter(tiny.transformer, folder / "wide", rank=9)
    write_adapter(tiny.transformer, folder.parent / f"{folder.name}-outside")
    return folder


@pytest.fixture
def site(tiny: LanguageModel, folder: Path) -> Iterator[Live]:
    """The model and adapter a, under two names of the model."""
    config = ServerConfig(
        names=("tiny", "second"), loras=(f"a={folder / 'a'}",), lora_folder=folder, max_loras=3, max_lora_rank=4
    )
    with live(tiny, config) as running:
        yield running
        running.wait_idle()


def complete(site: Live, model: str, **fields: Any) -> Any:
    """The response to a completion of token ids."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0, **fields}
    return HTTP.post(f"{site.url}/v1/completions", json=body)


def text_of(site: Live, model: str) -> str:
    answer = complete(site, model)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def change(site: Live, what: str, **body: Any) -> Any:
    return HTTP.post(f"{site.url}/v1/{what}_lora_adapter", json=body)


def expected(tiny: LanguageModel, folder: Path | None) -> str:
    """The text of the model with that adapter alone."""
    model = tiny.transformer if folder is None else folded(tiny.transformer, folder)
    alone = LanguageModel(model, tiny.tokenizer, name="alone")
    ids = alone.generate_ids(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    assert tiny.tokenizer is not None
    return tiny.tokenizer.decode(ids, after=PROMPT)


def test_each_name_has_its_own_text_however_many_at_a_time(site: Live, tiny: LanguageModel, folder: Path) -> None:
    assert change(site, "load", lora_name="b", lora_path="b").status_code == 200
    names = {"tiny": None, "tiny:a": folder / "a", "second:a": folder / "a", "a": folder / "a", "tiny:b": folder / "b"}
    texts: dict[str, str] = {}
    threads = [threading.Thread(target=lambda name=name: texts.update({name: text_of(site, name)})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {name: expected(tiny, path) for name, path in names.items()}
    assert len(set(texts.values())) == 3
    assert complete(site, "second:a").json()["model"] == "tiny:a"


def test_no_prefix_is_found_across_adapters(site: Live) -> None:
    cached = [complete(site, name).json()["diffusion"]["cached_tokens"] for name in ("tiny", "tiny:a", "tiny", "second:a")]
    assert cached == [0, 0, 8, 8]


def test_every_api_knows_the_name(site: Live) -> None:
    say = [{"role": "user", "content": "Hello"}]
    asked = {
        "/v1/chat/completions": {"messages": say, "max_tokens": 4},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 16},
        "/v1/messages": {"messages": say, "max_tokens": 4},
        "/v1/infill": {"text": "One ___ three", "tokens": 2},
        "/infill": {"input_prefix": "One", "n_predict": 4},
        "/api/chat": {"messages": say, "stream": False, "options": {"num_predict": 4}},
        "/api/generate": {"prompt": "Hello", "stream": False, "options": {"num_predict": 4}},
    }
    for path, body in asked.items():
        answer = HTTP.post(f"{site.url}{path}", json={"model": "tiny:a", **body})
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny:a"), (path, answer.text)
    for path, body in {
        "/v1/responses/input_tokens": {"input": "Hello"},
        "/v1/messages/count_tokens": {"messages": say},
        "/v1/tokenize": {"prompt": "Hello"},
        "/v1/detokenize": {"tokens": [20]},
        "/api/show": {},
    }.items():
        assert HTTP.post(f"{site.url}{path}", json={"model": "tiny:a", **body}).status_code == 200, path
        assert HTTP.post(f"{site.url}{path}", json={"model": "tiny:b", **body}).status_code == 404, path


def test_lists_say_what_the_base_is(site: Live) -> None:
    models = {each["id"]: each["parent"] for each in HTTP.get(f"{site.url}/v1/models").json()["data"]}
    assert models == {"tiny": None, "second": None, "tiny:a": "tiny"}
    assert HTTP.get(f"{site.url}/v1/models/a").json()["id"] == "tiny:a"
    assert [each["name"] for each in HTTP.get(f"{site.url}/api/tags").json()["models"]] == ["tiny:latest", "tiny:a"]
    page = HTTP.get(f"{site.url}/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert [each["id"] for each in page["data"]] == ["tiny", "tiny:a"]


def test_a_request_keeps_its_adapter_when_it_is_unloaded_or_replaced(tmp_path: Path) -> None:
    model = served_model(tmp_path / "tokenizer")
    assert isinstance(model, SlowModel)
    for seed, name in enumerate("ab", 1):
        write_adapter(model.transformer, tmp_path / name, seed=seed)
    config = ServerConfig(loras=(f"a={tmp_path / 'a'}",), lora_folder=tmp_path, max_loras=2)
    with live(model, config) as site:
        before = text_of(site, "tiny:a")
        model.seconds = 0.05
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(text_of(site, "tiny:a")))
        thread.start()
        soon(lambda: site.worker.num_requests)
        assert change(site, "load", lora_name="a", lora_path="b", load_inplace=True).status_code == 200
        assert change(site, "unload", lora_name="a").status_code == 200
        assert complete(site, "tiny:a").status_code == 404
        assert "of at most 2" not in change(site, "load", lora_name="a", lora_path="b").text
        thread.join()
        model.seconds = 0.0
        assert texts == [before]
        assert text_of(site, "tiny:a") == expected(model, tmp_path / "b") != before


def test_running_and_waiting_adapters_are_told_as_vllm_does(tiny: LanguageModel, folder: Path) -> None:
    assert isinstance(tiny, SlowModel)

    def told(site: Live) -> tuple[str, str] | None:
        lines = [
            each for each in HTTP.get(f"{site.url}/metrics").text.splitlines() if each.startswith("vllm:lora_requests_info")
        ]
        if not lines:
            return None
        found = re.fullmatch(
            r'.*\{max_lora="8",running_lora_adapters="(.*)",waiting_lora_adapters="(.*)"\} (.*)', "".join(lines)
        )
        assert found is not None, lines
        assert float(found[3]) == pytest.approx(time.time(), abs=60)
        return found[1], found[2]

    config = ServerConfig(loras=tuple(f"{name}={folder / name}" for name in "abc"), max_concurrent=2)
    with live(tiny, config) as site:
        soon(lambda: told(site) == ("", ""))
        tiny.seconds = 0.05
        try:
            threads = [
                threading.Thread(target=complete, args=(site, f"tiny:{name}"), kwargs={"max_tokens": 80}) for name in "abc"
            ]
            for count, thread in enumerate(threads, 1):
                thread.start()
                soon(lambda count=count: site.worker.num_requests == count)  # type: ignore[misc]
            soon(lambda: told(site) == ("a,b", "c"))
        finally:
            tiny.seconds = 0.0
        for thread in threads:
            thread.join()
        assert told(site) == ("", "")
    with live(tiny) as site:
        soon(lambda: site.worker.current_engine)
        assert told(site) is None


def test_as_many_as_may_be(site: Live) -> None:
    for name in "bc":
        assert change(site, "load", lora_name=name, lora_path=name).status_code == 200
    answer = change(site, "load", lora_name="d", lora_path="c")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_adapters")
    assert change(site, "unload", lora_name="b").status_code == 200
    assert change(site, "load", lora_name="d", lora_path="c").status_code == 200
    assert text_of(site, "d") == text_of(site, "c")


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"lora_name": "a/b", "lora_path": "b"}, "lora_name", "a/b"),
        ({"lora_name": "latest", "lora_path": "b"}, "lora_name", "latest"),
        ({"lora_name": "second", "lora_path": "b"}, "lora_name", "second"),
        ({"lora_name": "a", "lora_path": "b"}, "lora_name", "load_inplace"),
        ({"lora_name": "b", "lora_path": "missing"}, "lora_path", "missing"),
        ({"lora_name": "b", "lora_path": "../adapters-outside"}, "lora_path", "outside"),
        ({"lora_name": "b", "lora_path": "/"}, "lora_path", "/"),
        ({"lora_name": "b", "lora_path": "b\0"}, "lora_path", "folder"),
        ({"lora_name": "b", "lora_path": "other"}, "lora_path", "architecture"),
        ({"lora_name": "b", "lora_path": "wide"}, "lora_path", "max_lora_rank"),
        ({"lora_name": "b", "lora_path": "."}, "lora_path", "adapter_config.json"),
        ({"lora_name": "b"}, "lora_path", "lora_path"),
    ],
)
def test_what_is_refused_says_why(site: Live, folder: Path, body: dict[str, Any], param: str, named: str) -> None:
    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to(folder.parent / f"{folder.name}-outside")
    for path in (body.get("lora_path"), "link" if named == "outside" else None):
        if path is None and "lora_path" in body:
            continue
        answer = change(site, "load", **({**body, "lora_path": path} if path is not None else body))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        assert (named if path != "link" else "link") in answer.json()["error"]["message"]
        assert str(folder) not in answer.text
    assert complete(site, "tiny:b").status_code == 404


def test_unloading_what_is_not_there(site: Live) -> None:
    answer = change(site, "unload", lora_name="b")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


def test_off_by_default_and_only_for_admins(tiny: LanguageModel, folder: Path, tmp_path: Path) -> None:
    body = {"lora_name": "a", "lora_path": str(folder / "a")}
    with live(tiny) as site:
        for what in ("load", "unload"):
            answer = change(site, what, **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "lora_updates_off")
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: user, key: user-key}\n- {name: boss, key: boss-key, admin: true}\n")
    with live(tiny, ServerConfig(keys_file=keys, lora_folder=folder)) as site:
        for key, status in (("user-key", 403), ("boss-key", 200)):
            headers = {"authorization": f"Bearer {key}"}
            answer = HTTP.post(f"{site.url}/v1/load_lora_adapter", json=body, headers=headers)
            assert answer.status_code == status, answer.text


def test_adapters_of_the_config_are_checked_at_the_start(tiny: LanguageModel, folder: Path) -> None:
    for loras, named in ((("a",), "NAME=FOLDER"), (("a=x", "a=y"), "differ"), (("a=x",) * 9, "max_loras")):
        with refused(ConfigError, named):
            ServerConfig(loras=loras)
    with refused(CheckpointError, "architecture"):
        create_app(tiny, ServerConfig(loras=(f"a={folder / 'other'}",)))
    with refused(ConfigError, "a:b"):
        create_app(tiny, ServerConfig(loras=(f"a:b={folder / 'a'}",)))


def test_an_adapter_may_have_a_tokenizer_of_its_own(tiny: LanguageModel, tmp_path: Path) -> None:
    """It lays out conversations, as it does where the adapter is loaded alone."""
    assert tiny.tokenizer is not None
    write_adapter(tiny.transformer, tmp_path / "a")
    make_tokenizer(tmp_path / "a", mask_token="<file_sep>", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    with live(tiny, ServerConfig(loras=(f"a={tmp_path / 'a'}",))) as site:
        counts = [HTTP.post(f"{site.url}/v1/tokenize", json={"model": name, **body}).json()["count"] for name in ("tiny", "a")]
    assert counts[1] < counts[0]
