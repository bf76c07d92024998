"""One server for all tests that only talk to it, and the official client in front of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from asking import connect
from live import HERMES, Live, live, served_model
from openai import OpenAI

from unmask.engine.llm import LanguageModel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A random diffusion model."""
    return served_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def site(tiny: LanguageModel) -> Iterator[Live]:
    """The model, served with the default settings; at the end no cache block may be used."""
    with live(tiny) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A random model whose template knows tools."""
    folder = tmp_path_factory.mktemp("caller")
    return served_model(folder, context=2048, chat_template=HERMES, plain_added=("<tool_call>",))


@pytest.fixture(scope="session")
def office(caller: LanguageModel) -> Iterator[Live]:
    """That model, served."""
    with live(caller) as running:
        yield running
        running.wait_idle()


@pytest.fixture(scope="session")
def client(site: Live) -> Iterator[OpenAI]:
    """The official client of that server, which tries nothing twice."""
    with connect(site.url) as made:
        yield made


@pytest.fixture(scope="session")
def ray_token() -> Iterator[None]:
    """The token of Ray's clusters. Without one, what it finds in the user's home decides; once imported, it looks no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield
