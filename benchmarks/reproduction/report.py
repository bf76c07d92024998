"""Child against autoregressive control and llama.cpp: settings chosen on validation, then quality and speed on test questions.

    python benchmarks/reproduction/report.py [--child MODEL] [--control MODEL] [--llama-python PYTHON] [--docs]

The control is the autoregressive model inside the child, which its gated LoRA leaves as it is, unless another is given.

Runs `unmask eval`, `sweep` and `compare`, or goes on with them where it stopped; chooses the fastest setting whose score on
validation is at least 0.99 of the control's, or the best-scoring one where there is none; times all sides by turns; and
writes report.md, report.json and plots. --llama-python is a Python that has llama-cpp-python. --docs puts everything into
docs/reproduction.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import by_turns, compare_settings

from unmask.engine.sampling_params import SamplingParams
from unmask.eval.provenance import environment
from unmask.files import atomic_write_json

SUITE = "mini-5"
QUALITY, SPEED = 0.99, 2.1
"""Targets: share of the control's mean score, and of its tokens/s and of llama.cpp's."""
DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- report: written by benchmarks/reproduction/report.py --docs -->", "<!-- report ends -->"
PLOTS = {"tasks.png": "Scores and speed, by task", "frontier.png": "Score over tokens per forward, by setting"}


def unmask(*arguments: object) -> None:
    """Run the command line, its output passed on."""
    command = [str(Path(sys.executable).with_name("unmask")), *map(str, arguments)]
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run(command, check=True)


def mean_score(results: dict[str, Any]) -> float:
    """Plain mean over the suite's tasks."""
    return statistics.fmean(task["score"] for task in results["tasks"].values())


def choose(points: list[dict[str, Any]], wanted: float) -> dict[str, Any]:
    """The fastest point that scores at least `wanted`; where there is none, the best-scoring one."""
    enough = [point for point in points if point["score"] >= wanted]
    if enough:
        return max(enough, key=lambda point: point["tokens_per_second"])
    return max(points, key=lambda point: (point["score"], point["tokens_per_second"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs; what report.json holds."""
    out: Path = options.out
    asked = ("--suite", SUITE, "--split", "validation", "--limit", options.validation)
    unmask("eval", "--model", options.control, *asked, "--out", out / "control-validation", "--resume")
    grid = ("--block-sizes", options.block_sizes, "--thresholds", options.thresholds)
    unmask("sweep", "--model", options.child, *asked, *grid, "--out", out / "sweep")
    control = mean_score(read(out / "control-validation" / "results.json"))
    points = read(out / "sweep" / "sweep.json")["points"]
    # The sweep takes them one after the other, and this machine differs more from minute to minute than they do.
    settings = [setting_of(point) for point in points]
    for point, speed in zip(points, compare_settings(options.child, settings, options.validation), strict=True):
        point["tokens_per_second"] = speed
    point = choose(points, QUALITY * control)
    flags = ("--block-size", point["block_size"], "--threshold", point["threshold"])
    unmask(
        "compare", options.control, options.child, "--suite", SUITE, "--limit", options.test, *flags, "--out", out / "compare"
    )
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "environment": environment(),
        "child": options.child,
        "control": options.control,
        "validation": {"items": options.validation, "control": control, "chosen": point, "points": points},
        "test": read(out / "compare" / "comparison.json")["tasks"],
        "turns": take_turns(options, point),
    }


def take_turns(options: argparse.Namespace, point: dict[str, Any]) -> dict[str, Any]:
    """Speeds at a setting."""
    return by_turns(options.child, options.control, options.llama_python, setting_of(point), options.turns)


def setting_of(point: dict[str, Any]) -> SamplingParams:
    """The decoding options of a point of the sweep."""
    return SamplingParams(block_size=point["block_size"], threshold=point["threshold"])


def read(path: Path) -> dict[str, Any]:
    """A json file."""
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def interval(values: dict[str, float], scale: float, digits: int, *, signed: bool = False) -> str:
    """`value (low to high)`."""
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    value, low, high = (form.format(scale * values[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def describe(found: dict[str, Any]) -> list[str]:
    """The report in Markdown."""
    validation, turns, whole = found["validation"], found["turns"], found["test"]["all"]
    chosen, machine = validation["chosen"], found["environment"]
    lines = [
        f"{found['date']}, {machine['cpu']}, {machine['cores']} cores. Block size {chosen['block_size']} and threshold "
        f"{chosen['threshold']:g}, chosen on {validation['items']} validation questions a task (control "
        f"{100 * validation['control']:.1f}, child there {100 * chosen['score']:.1f}). Test questions: {whole['items']}.",
        "",
        "| task | control | child | difference (95%) | tokens per forward | tokens/s, child / control |",
        "|---|---|---|---|---|---|",
    ]
    over = turns["child_over"]["control"]
    for task, row in found["test"].items():
        difference, speed = interval(row["difference"], 100, 1, signed=True), over["tasks"].get(task, over["median"])
        name, scores = task.removeprefix(f"{SUITE}/"), f"{100 * row['a']:.1f} | {100 * row['b']:.1f}"
        lines.append(f"| {name} | {scores} | {difference} | {row['forwards']['value']:.2f} | {speed:.2f} |")
    quality = whole["b"] / max(whole["a"], 1e-9)
    lines += [
        "",
        f"**Quality: {quality:.3f} of the control's mean (target {QUALITY}). Speed: {over['median']:.2f} times the control's "
        f"tokens/s (target {SPEED}).** One stream, prefill and every forward counted; once the prompt is read, "
        f"{over['decoding']:.2f} times.",
        "",
        f"Speeds are taken by turns, task by task, {turns['threads']} threads each, over {turns['items']} of these questions, "
        "and are medians over questions (here with the 10th to 90th percentile, beside the ratio of the sums):",
        "",
        "| | tokens/s | child over it, by question | in sum | in sum, after the first forward |",
        "|---|---|---|---|---|",
        f"| child | {turns['tokens_per_second']['child']:.0f} | | | |",
    ]
    names = {"control": "control, our engine", "llama.cpp": f"llama.cpp {turns['llama_cpp_python']}, parent's Q4_1 weights"}
    for name, over in sorted(turns["child_over"].items()):
        spread = f"{over['median']:.2f} ({over['p10']:.2f} to {over['p90']:.2f})"
        sums = f"{over['ratio']:.2f} | {over['decoding']:.2f}"
        lines.append(f"| {names[name]} | {turns['tokens_per_second'][name]:.0f} | {spread} | {sums} |")
    lines += ["", "Every setting on validation, tokens/s by turns:", ""]
    lines += ["| block size | threshold | score | tokens per forward | tokens/s |", "|---|---|---|---|---|"]
    for point in validation["points"]:
        lines.append(
            f"| {point['block_size']} | {point['threshold']:g} | {100 * point['score']:.1f} "
            f"| {point['tokens_per_forward']:.2f} | {point['tokens_per_second']:.0f} |"
        )
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Scores of both, and how many times faster the child is, by task."""
    import matplotlib.pyplot as plt

    names, rows = list(found["test"]), list(found["test"].values())
    labels = [name.removeprefix(f"{SUITE}/") for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for side, (key, label) in enumerate((("a", "control"), ("b", "child"))):
        places = [place + 0.4 * side for place in range(len(rows))]
        left.barh(places, [100 * row[key] for row in rows], 0.38, label=label)
    for side, (rival, over) in enumerate(sorted(found["turns"]["child_over"].items())):
        ratios = [over["tasks"].get(name, over["median"]) for name in names]
        right.barh(
            [place + 0.4 * side for place in range(len(rows))], ratios, 0.38, label=f"over {rival}", color=f"C{2 + side}"
        )
    right.axvline(SPEED, color="black", linestyle=":", label=f"target {SPEED}")
    left.set_yticks([place + 0.2 for place in range(len(rows))], labels)
    left.invert_yaxis()
    left.set_xlabel("score")
    right.set_xlabel("tokens/s of the child, by turns")
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def publish(lines: list[str], out: Path) -> None:
    """Put the report and its plots into the documentation."""
    page, images = DOCS / "reproduction.md", DOCS / "images"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    plots = [f"![{caption}](images/reproduction-{name})" for name, caption in PLOTS.items()]
    for name in PLOTS:
        shutil.copyfile(next(out.rglob(name)), images / f"reproduction-{name}")
    page.write_text("\n".join([before + BEGIN, *lines, "", *plots, END]) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", default="smollm2-135m-diffusion")
    parser.add_argument("--control", help="[default: the one inside the child]")
    parser.add_argument("--out", type=Path, default=Path("out/reproduction/report"))
    parser.add_argument("--validation", type=int, default=40, help="validation questions per task and setting")
    parser.add_argument("--test", type=int, default=60, help="test questions per task")
    parser.add_argument("--turns", type=int, default=20, help="test questions per task that all are timed on by turns")
    parser.add_argument("--block-sizes", default="4,6,8")
    parser.add_argument("--thresholds", default="0.5,0.7,0.8")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python [default: not compared with]")
    parser.add_argument("--speeds-only", action="store_true", help="keep a finished report's answers, take its speeds again")
    parser.add_argument("--docs", action="store_true", help="write the report into docs/reproduction.md")
    options = parser.parse_args()
    if options.control is None:
        options.control = str(options.out.with_name("parent"))
        shutil.rmtree(options.control, ignore_errors=True)
        unmask("export", options.child, "--parent", "--out", options.control)
    if options.speeds_only:
        found = read(options.out / "report.json")
        found["turns"] = take_turns(options, found["validation"]["chosen"])
    else:
        if (options.out / "report.json").exists():  # a finished report is made anew, an interrupted one goes on
            shutil.rmtree(options.out)
        options.out.mkdir(parents=True, exist_ok=True)
        found = measure(options)
    atomic_write_json(options.out / "report.json", found)
    lines = describe(found)
    draw(found, options.out / "tasks.png")
    (options.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if options.docs:
        publish(lines, options.out)


if __name__ == "__main__":
    main()
