"""The sdist and the wheel hold what they must, and an installed wheel works outside the checkout."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

from unmask.models.native.variants import variants_of

ROOT = Path(__file__).parents[1]


def tracked(*folders: str) -> set[str]:
    """Files under version control; all there are where the checkout is an unpacked sdist."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_holds_every_file_of_the_package() -> None:
    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"src/{path}" for path in packed} >= tracked("src/unmask")


def test_sdist_holds_what_tests_and_documentation_need() -> None:
    packed = {file.distribution_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert packed >= tracked("src", "tests", "recipes", "docs", "benchmarks", "scripts", "deploy")
    assert packed >= {"Makefile", "README.md", "LICENSE", "constraints.txt", "mkdocs.yml", "hatch_build.py"}
    assert not any(path.endswith(".so") for path in packed)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`unmask` from a wheel built from the sdist, in an environment of its own; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    assert list(folder.glob("*.tar.gz"))
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    ours = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    # A path in a .pth file is searched, but .pth files found there are not read: not that of an editable unmask.
    Path(ours, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "-qq", "--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    return folder / "venv" / "bin" / "unmask"


def environment() -> dict[str, str]:
    """Without the checkout, and without a compiler."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
    return kept | {"COLUMNS": "100", "PATH": os.devnull}


def output(*command: object, folder: Path) -> str:
    """Standard output of a command that must succeed."""
    words = [str(word) for word in command]
    ran = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, (words, ran.stdout, ran.stderr)
    return ran.stdout


@pytest.mark.slow
def test_installed_wheel_works_outside_the_checkout(program: Path, tmp_path: Path) -> None:
    where = output(program.with_name("python"), "-c", "import unmask; print(unmask.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(program.parents[1])
    assert "generate" in output(program, "--help", folder=tmp_path)
    assert "--minutes" in output(program, "demo", "--help", folder=tmp_path)
    assert "134" in output(program, "info", "smollm2-135m", folder=tmp_path)
    assert output(program, "generate", "hi", "--max-new-tokens", "4", folder=tmp_path).strip()
    variant = "from unmask.models.native.library import kernel_variant; print(kernel_variant())"
    assert output(program.with_name("python"), "-c", variant, folder=tmp_path).strip() in variants_of(platform.machine())
    assert "mini-5" in output(program, "eval", "--list", folder=tmp_path)


@pytest.mark.slow
def test_installed_wheel_serves_its_page(program: Path, tmp_path: Path) -> None:
    server = subprocess.Popen(
        [str(program), "serve", "--port", "0", "--quantize", "none"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        address = next(line.split()[-1] for line in server.stderr if " is served at " in line)
        with urllib.request.urlopen(address, timeout=60) as page:
            assert b"<html" in page.read()
        with urllib.request.urlopen(f"{address}/health", timeout=60) as health:
            assert health.status == 200
    finally:
        server.terminate()
        server.communicate(timeout=60)
