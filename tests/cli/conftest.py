"""A tiny model folder with a tokenizer, autoregressive and diffusion, and a way to call the program."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import unmask
from helpers import assert_names, make_tokenizer
from lora_folders import folded, write_adapter
from tiny import tiny_model
from unmask.cli.app import app
from unmask.engine.llm import LanguageModel
from unmask.models.weights.checkpoint import save_model

CONTEXT = 256
Run = Callable[..., Any]


def make_folder(folder: Path, *, diffusion: bool) -> Path:
    """A random llama with the test tokenizer; <file_sep> is the mask token of the diffusion one."""
    tokenizer = make_tokenizer(folder, mask_token="<file_sep>" if diffusion else None)
    special: dict[str, Any] = {"mask_id": tokenizer.mask_id, "block_size": 8} if diffusion else {}
    model = tiny_model(
        "llama", vocab_size=tokenizer.vocab_size, max_positions=CONTEXT, eos_ids=(tokenizer.eos_id,), tied_head=True, **special
    )
    save_model(model, folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _plain_plots(plain_plots: None) -> None:
    """No plots; see tests/conftest.py."""


@pytest.fixture(scope="session")
def ar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive model; read only."""
    return make_folder(tmp_path_factory.mktemp("models") / "ar", diffusion=False)


@pytest.fixture(scope="session")
def diffusion_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion model; read only."""
    return make_folder(tmp_path_factory.mktemp("models") / "diffusion", diffusion=True)


@pytest.fixture(params=["ar", "diffusion"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each kind of model in turn; read only."""
    path: Path = request.getfixturevalue(f"{request.param}_folder")
    return path


@pytest.fixture
def own_folder(ar_folder: Path, tmp_path: Path) -> Path:
    """A copy of the autoregressive model for a test to damage."""
    return Path(shutil.copytree(ar_folder, tmp_path / "own"))


@pytest.fixture(scope="session")
def adapter(diffusion_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the diffusion model; read only."""
    return write_adapter(unmask.load(diffusion_folder, dtype="float32").transformer, tmp_path_factory.mktemp("adapters") / "a")


@pytest.fixture(scope="session")
def adapted(diffusion_folder: Path, adapter: Path) -> LanguageModel:
    """The diffusion model with that adapter folded in."""
    base = unmask.load(diffusion_folder, dtype="float32")
    return LanguageModel(folded(base.transformer, adapter), base.tokenizer, name="adapted")


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Forty short exchanges as jsonl."""
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps({"prompt": f"What is {i} + 3?", "response": f"The answer is {i + 3}."}) for i in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run() -> Run:
    """Call the program in this process: `run("info", folder)` gives exit_code, stdout and stderr."""
    return lambda *arguments, **options: CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Call the program, which must end with this exit code and one line of error that names `names`; gives the line."""

    def check(*arguments: object, code: int = 2, names: Iterable[object] = (), **options: Any) -> str:
        result = run(*arguments, **options)
        assert result.exit_code == code, (result.exit_code, result.output, result.exception)
        assert isinstance(result.exception, SystemExit), f"a traceback: {result.exception!r}"
        assert result.stderr.startswith("error: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert_names(result.stderr, *names)
        return str(result.stderr)

    return check
