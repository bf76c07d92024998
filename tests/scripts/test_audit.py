"""The audit fails where a vulnerability is known, and says so where nothing could be checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from audit import audit

GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "named"),
    [
        ([GOOD, UNKNOWN], 0, "1 of 2 packages checked, 0 vulnerabilities"),
        ([GOOD, BAD], 1, "bad 2.0: CVE-1; fixed in 2.1"),
        ([UNKNOWN, UNKNOWN], 0, "nothing was checked"),
        (None, 0, "nothing was checked"),
    ],
)
def test_audit(tmp_path: Path, packages: list[dict[str, object]] | None, code: int, named: str) -> None:
    program = tmp_path / "pip-audit"
    output = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    program.chmod(0o755)
    assert (found := audit(str(program), tmp_path / "constraints.txt"))[0] == code
    assert named in found[1]


def test_without_the_program_nothing_is_checked(tmp_path: Path) -> None:
    assert audit(str(tmp_path / "nowhere"), tmp_path)[0] == 0
