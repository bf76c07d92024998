"""Child against autoregressive control: settings chosen on validation, then quality and speed on test questions, paired.

    python benchmarks/reproduction/report.py --child out/reproduction/child --control out/reproduction/control

Runs `unmask eval`, `sweep` and `compare` (each goes on where it was stopped), chooses the fastest setting whose score there
is at least 0.99 of the control's, or the best-scoring one where there is none, and writes report.md with what they found.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SUITE = "mini-5"
QUALITY, SPEED = 0.99, 2.1
"""Targets: share of the control's mean score, and of its tokens/s."""


def unmask(*arguments: object) -> None:
    """Run the command line, its output passed on."""
    command = [str(Path(sys.executable).with_name("unmask")), *map(str, arguments)]
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


def mean_score(results: dict[str, Any]) -> float:
    """Plain mean over the suite's tasks."""
    scores = [task["score"] for task in results["tasks"].values()]
    return sum(scores) / len(scores)


def choose(points: list[dict[str, Any]], wanted: float) -> dict[str, Any]:
    """The fastest point that scores at least `wanted`; where there is none, the best-scoring one, the faster of equals."""
    enough = [point for point in points if point["score"] >= wanted]
    if enough:
        return max(enough, key=lambda point: point["tokens_per_second"])
    return max(points, key=lambda point: (point["score"], point["tokens_per_second"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", default="out/reproduction/child")
    parser.add_argument("--control", default="out/reproduction/control")
    parser.add_argument("--out", type=Path, default=Path("out/reproduction/report"))
    parser.add_argument("--validation", type=int, default=20, help="validation questions per task and setting")
    parser.add_argument("--test", type=int, default=100, help="test questions per task")
    parser.add_argument("--block-sizes", default="4,8,16")
    parser.add_argument("--thresholds", default="0.5,0.7,0.8,0.9,0.95")
    options = parser.parse_args()
    out: Path = options.out
    asked = ("--suite", SUITE, "--split", "validation", "--limit", options.validation)
    unmask("eval", "--model", options.control, *asked, "--out", out / "control-validation", "--resume")
    grid = ("--block-sizes", options.block_sizes, "--thresholds", options.thresholds)
    unmask("sweep", "--model", options.child, *asked, *grid, "--out", out / "sweep")
    control = mean_score(json.loads((out / "control-validation" / "results.json").read_text()))
    point = choose(json.loads((out / "sweep" / "sweep.json").read_text())["points"], QUALITY * control)
    setting = ("--block-size", point["block_size"], "--threshold", point["threshold"])
    folder = out / f"block-{point['block_size']}-threshold-{point['threshold']:g}"
    unmask("compare", options.control, options.child, "--suite", SUITE, "--limit", options.test, *setting, "--out", folder)
    whole = json.loads((folder / "comparison.json").read_text())["tasks"]["all"]
    quality, speed = whole["b"] / max(whole["a"], 1e-9), whole["speed"]["value"]
    lines = [
        f"Chosen on {options.validation} validation questions a task (control {100 * control:.1f}): block size "
        f"{point['block_size']}, threshold {point['threshold']:g} (child {100 * point['score']:.1f}).",
        "A is the control, B the child.",
        "",
        *(line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")),
        "",
        f"Quality: {quality:.3f} of the control's mean (target {QUALITY}). Speed: {speed:.2f}x (target {SPEED}x).",
    ]
    (out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
