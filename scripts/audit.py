"""Known vulnerabilities of the pinned dependencies, by pip-audit; exit code 1 where there are any.

    python scripts/audit.py PIP_AUDIT [REQUIREMENTS]

Where no vulnerability service can be reached, nothing is checked: that is said, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 300
UNREACHED = "audit: no vulnerability service can be reached from here; nothing was checked"


def audit(pip_audit: str, requirements: Path) -> tuple[int, str]:
    """The exit code, and what to say.

    Args:
        pip_audit: the program.
        requirements: pinned versions.
    """
    command = [pip_audit, "--requirement", str(requirements), "--no-deps", "--disable-pip", "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except FileNotFoundError:
        return 0, f"audit: {pip_audit} could not be installed; nothing was checked"
    except (subprocess.TimeoutExpired, ValueError):
        return 0, UNREACHED
    # A service that does not know its packages answers for none.
    checked = [package for package in packages if "skip_reason" not in package]
    if not checked:
        return 0, UNREACHED
    found = [
        f"{package['name']} {package['version']}: {each['id']}; fixed in {', '.join(each['fix_versions']) or 'no version yet'}"
        for package in checked
        for each in package["vulns"]
    ]
    count = f"audit: {len(checked)} of {len(packages)} packages checked, {len(found)} vulnerabilities known"
    return (1 if found else 0), "\n".join([*found, count])


def main() -> None:
    code, message = audit(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "constraints.txt"))
    print(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
