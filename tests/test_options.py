"""A decoding option is declared in one file and appears in five places: command line, HTTP, /set, page, documentation."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unmask.engine import sampling_params
from unmask.engine.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]
PLACES = """
import json, runpy, sys
from types import SimpleNamespace
from typer.testing import CliRunner
from unmask.cli.chat_session import settable_options
from unmask.engine.capabilities import Capabilities
from unmask.cli.app import app
from unmask.models.arch.config import ModelConfig
from unmask.serve.config import ServerConfig
from unmask.serve.protocol.chat import ChatRequest
from unmask.serve.protocol.fields import Diffusion
from unmask.serve.served_model import ServedModel

EVERYTHING = Capabilities(True, True, True, True)
config = SimpleNamespace(block_size=8, shifted=True, mask_id=1, token_editing=True)
model = SimpleNamespace(config=config, is_diffusion=True, capabilities=EVERYTHING)
served = SimpleNamespace(language_model=model, config=ServerConfig(), name="m", parent=None, created=0, context=9)
hooks = runpy.run_path(sys.argv[-1])
print(json.dumps({
    "cli": CliRunner().invoke(app, ["generate", "--help"]).stdout,
    "http": list(ChatRequest.model_fields),
    "diffusion": list(Diffusion.model_fields),
    "set": list(settable_options()),
    "page": [option["name"] for option in ServedModel.describe(served, "any")["options"]],
    "docs": hooks["options_table"]("", "", "test"),
}))
"""
NEW = '    novelty: int | None = _option("Something new.", "Diffusion", default_text="7 of them", minimum=1)\n'


def places(prelude: str) -> dict[str, Any]:
    """What each place says in a process of its own, which begins with `prelude`."""
    code = [sys.executable, "-c", prelude + PLACES, str(ROOT / "docs" / "hooks.py")]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def names(found: dict[str, Any], option: str) -> set[str]:
    """The places that have an option."""
    flag = f"--{option.replace('_', '-')} "
    lists = {place for place in ("http", "diffusion", "set", "page") if option in found[place]}
    return lists | ({"cli"} if flag in found["cli"] else set()) | ({"docs"} if f"| `{option}` |" in found["docs"] else set())


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What each place says in this process."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["-c", str(ROOT / "docs" / "hooks.py")])
        exec(compile(PLACES, "places", "exec"), {"__name__": "places"})
    lists: dict[str, Any] = json.loads(said.getvalue())
    return lists


@pytest.mark.parametrize("option", SamplingParams.options().values(), ids=lambda option: option.name)
def test_every_option_is_where_it_is_declared_to_be(found: dict[str, Any], option: sampling_params.Option) -> None:
    elsewhere = {"logprobs": {"http"}}  # OpenAI's own field of this name is another one
    assert names(found, option.name) == {*option.surfaces, "docs"} | elsewhere.get(option.name, set())


def test_a_new_option_is_one_line_in_one_file() -> None:
    source = Path(sampling_params.__file__).read_text()
    place = "    policy: str = _option("
    assert source.count(place) == 1
    prelude = (
        "import sys, types\n"
        "module = types.ModuleType('unmask.engine.sampling_params')\n"
        "sys.modules[module.__name__] = module\n"
        f"exec({source.replace(place, NEW + place)!r}, vars(module))\n"
    )
    found = places(prelude)
    assert names(found, "novelty") == {"cli", "diffusion", "set", "page", "docs"}
    assert "Something new. [default: 7 of them]" in " ".join(found["cli"].split())
