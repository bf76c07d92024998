"""Start-up: from the shell to the first token, and to a server that is ready, against importing torch.

    python benchmarks/startup.py [--runs 5] [--json]

S1: processor time (user and system), wall-clock time and largest resident memory of

- `python -c "import torch"`,
- `unmask generate "hi" --max-new-tokens 1` with the packed weights in the cache,
- the same without them, which packs them once,
- `unmask serve` until `/health` answers and until `/ready` does,
- `unmask --help`,

by turns, medians. Targets: the first token and the ready server within 1.3 times the import and 0.3 s, `--help` within 0.5 s.
They are held to processor time: others use the machine too. Packed weights are in a cache of the run's own.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common import Figure, answers_at, arguments, figure, print_json, results_path, write_results
from rich.console import Console

from unmask.models.weights.hub import cache_folder, resolve
from unmask.serve.server import listen

LOG = Console(stderr=True)
PYTHON = sys.executable
FACTOR, EXTRA = 1.3, 0.3
HELP_SECONDS = 0.5
TIMEOUT = 600.0


class Cost(NamedTuple):
    """What one run took, in seconds, and its largest resident memory in MB."""

    cpu: float
    wall: float
    peak_mb: float


def run_to_end(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Run a command to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6)


def serve_until(path: str, model: str, environment: Mapping[str, str]) -> Cost:
    """Start a server and wait until `path` of it answers."""
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    command = (PYTHON, "-m", "unmask", "serve", "--model", model, "--port", str(port))
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not answers_at(f"http://127.0.0.1:{port}{path}"):
            if process.poll() is not None or time.perf_counter() - started > TIMEOUT:
                sys.exit(f"error: {' '.join(command)} ended with {process.poll()}")
            time.sleep(0.02)
        wall = time.perf_counter() - started
        return Cost(_cpu_seconds(process.pid), wall, _peak_mb(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:13]) / os.sysconf("SC_CLK_TCK")


def _peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def measure(model: str, runs: int, cache: Path) -> dict[str, list[Cost]]:
    """The costs of every case, by turns."""
    # Bytecode is kept, as that of installed packages is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["UNMASK_CACHE"] = str(cache)
    generate = (PYTHON, "-m", "unmask", "generate", "hi", "--max-new-tokens", "1", "--model", model)

    def without_packed() -> Cost:
        shutil.rmtree(cache / "packed", ignore_errors=True)
        return run_to_end(generate, environment)

    cases: dict[str, Callable[[], Cost]] = {
        "import_torch": lambda: run_to_end((PYTHON, "-c", "import torch"), environment),
        "help": lambda: run_to_end((PYTHON, "-m", "unmask", "--help"), environment),
        "first_token_unpacked": without_packed,
        "first_token": lambda: run_to_end(generate, environment),
        "serve_health": lambda: serve_until("/health", model, environment),
        "serve_ready": lambda: serve_until("/ready", model, environment),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in cases}
    for number in range(runs):
        for name, case in cases.items():
            costs[name].append(case())
        LOG.print(f"{number + 1} of {runs} turns", style="dim")
    return costs


def figures_of(costs: Mapping[str, Sequence[Cost]]) -> dict[str, Figure]:
    """Medians, beside the targets."""

    def median(name: str, field: str) -> float:
        return float(statistics.median(getattr(cost, field) for cost in costs[name]))

    bound = FACTOR * median("import_torch", "cpu") + EXTRA
    targets = {"first_token": bound, "serve_ready": bound, "help": HELP_SECONDS}
    cpu = {f"{name}_cpu_s": figure(median(name, "cpu"), targets.get(name), higher_is_better=False) for name in costs}
    wall = {f"{name}_wall_s": figure(median(name, "wall")) for name in costs}
    peak = {f"{name}_peak_mb": figure(median(name, "peak_mb")) for name in costs}
    return cpu | wall | peak


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-diffusion")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name)
        resolve(options.model)  # unpacked, if it is an embedded one
        for folder in (path for path in cache_folder().glob("*") if path.is_dir() and path.name != "packed"):
            (cache / folder.name).symlink_to(folder)
        figures = figures_of(measure(options.model, 1 if options.smoke else options.runs, cache))
    write_results(results_path(options.results, "startup"), figures)
    if options.json:
        print_json(figures)
        return
    for name, found in figures.items():
        bound = "" if found["target"] is None else f" (target {found['target']:.2f}: {'met' if found['met'] else 'missed'})"
        LOG.print(f"{name}: {found['value']:.2f}{bound}")


if __name__ == "__main__":
    main()
