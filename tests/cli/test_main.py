"""The program as a whole: help, version, start-up cost, and how failures end."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import unmask
from unmask.cli.app import app
from unmask.cli.main import SPINNING, limit_spinning
from unmask.errors import DataError

VERBS = (
    "generate",
    "infill",
    "trace",
    "chat",
    "serve",
    "batch",
    "convert",
    "sft",
    "dpo",
    "pack",
    "plan",
    "info",
    "merge",
    "export",
    "quantize",
    "demo",
    "eval",
    "compare",
    "sweep",
    "ceiling",
    "ngrams",
)


def test_version(run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"unmask {unmask.__version__}\n")


def test_help_names_every_verb(run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = {line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line.strip()}
    assert listed == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_teaches_with_an_example(run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert f"\n  unmask {verb}" in result.stdout


def test_all_verbs_decode_with_the_same_weights_by_default() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    defaults = {verb: each.default for verb in VERBS for each in commands[verb].params if each.name == "quantize"}
    decoding = ("generate", "infill", "trace", "chat", "serve", "batch", "eval", "compare", "sweep", "ceiling")
    assert defaults == dict.fromkeys(decoding, "auto")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from unmask.cli.app import app; "
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0; "
        "print([name for name in ('torch', 'numpy', 'rich', 'unmask.train') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_generate_loads_only_what_it_needs(diffusion_folder: Path) -> None:
    """What other verbs, other options or a first start need would take longer than the answer."""
    unwanted = (
        *("transformers", "torch._dynamo", "sympy", "rich", "fastapi", "httpx", "httpx2", "huggingface_hub", "datasets"),
        *("pyarrow", "llguidance", "gguf", "zstandard", "matplotlib", "unmask.train", "unmask.serve", "unmask.eval"),
    )
    code = (
        f"import sys; sys.argv[1:] = ['generate', 'hi', '--max-new-tokens', '1', '--model', {str(diffusion_folder)!r}]\n"
        "from unmask.cli.main import main\n"
        "try: main()\n"
        f"finally: print([name for name in {unwanted} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["--nope"], ["nope"], ["generate", "x", "--nope"], ["generate", "x", "--seed", "a"], ["convert", "--data", "x"]],
)
def test_usage_errors_end_with_2(run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def _raise_from_info(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `unmask info x` end with `error` deep inside."""

    def explode(model: str) -> None:
        raise error

    monkeypatch.setattr("unmask.cli.info.find_config", explode)


@pytest.mark.parametrize(
    ("error", "code", "names"),
    [
        (DataError("one\ntwo"), 2, ["one two"]),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 1, ["/out/x", "space"]),
        (PermissionError(errno.EACCES, "Permission denied", "/out/x"), 1, ["/out/x", "Permission denied"]),
        (MemoryError(), 1, ["memory"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, ["out of memory"]),
    ],
)
def test_failures_are_one_line(fails, monkeypatch, error: BaseException, code: int, names: list[str]) -> None:
    _raise_from_info(monkeypatch, error)
    fails("info", "x", code=code, names=names)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyError("x"), OSError("odd")])
def test_our_own_bugs_keep_their_traceback(run, monkeypatch, error: Exception) -> None:
    _raise_from_info(monkeypatch, error)
    assert run("info", "x").exception is error


def test_interrupt_ends_with_130(run, monkeypatch) -> None:
    _raise_from_info(monkeypatch, KeyboardInterrupt())
    result = run("info", "x")
    assert (result.exit_code, result.stdout) == (130, "")


def test_ctrl_c_during_imports_is_quiet() -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'unmask.cli.console':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from unmask.cli.main import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SPINNING),
        ({"GOMP_SPINCOUNT": "7"}, SPINNING | {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_spin_little_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", given)
    limit_spinning()
    assert given == expected


@pytest.mark.parametrize(("closed", "code", "stderr"), [(">&-", 1, "error: standard output is closed"), ("<&-", 0, "")])
def test_closed_streams_are_no_traceback(closed: str, code: int, stderr: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m unmask --version {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(stderr)
    assert done.stderr.count("\n") == (1 if stderr else 0)


@pytest.mark.parametrize("printing", ["typer.echo('x' * 100_000)", "make_console().print('x' * 100_000)"])
def test_broken_pipe_is_quiet(printing: str) -> None:
    """The reader goes away before the first byte: no traceback, no complaint at shutdown."""
    code = (
        "import typer; from unmask.cli.app import app; from unmask.cli.console import make_console; "
        f"from unmask.cli.main import main; app.command('say')(lambda: {printing}); main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "say"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait()
    assert stderr == b""
