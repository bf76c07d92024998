"""The reproduction's figures from the shipped weights: the parent as it is, faster; and a full conversion against its control.

    python benchmarks/reproduction/report.py [--per-kind 4] [--control MODEL] [--llama-python PYTHON] [--docs]

1. The parent's own text, faster: `benchmarks/everyday.py` on the model that drafts for its unmodified parent; with a Python
   that has llama-cpp-python also `benchmarks/vs_llamacpp.py`, which takes some ten minutes more.
2. One checkpoint, three modes: mini-5's test questions, answered by the model converted in full in modes `ar`, `speculative`
   and `diffusion`, against the autoregressive control of as many tokens. The control is not shipped: what it answered is in
   benchmarks/results/control, unless another is given. Then speeds of the modes by turns.

Runs `unmask eval`, or goes on with it where it stopped; writes report.md, report.json and a plot. --docs puts everything into
docs/reproduction.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import Answer, by_turns, speed

from unmask.engine.sampling_params import SamplingParams
from unmask.eval.compare import compare_samples
from unmask.eval.provenance import environment
from unmask.eval.runner import load_samples
from unmask.files import atomic_write_json, read_json

SUITE, TARGET = "mini-5", 0.99
"""Questions, and the share of the control's mean score that modes `ar` and `speculative` are to reach."""
MODES = ("ar", "speculative", "diffusion")
BENCHMARKS = Path(__file__).parents[1]
RECORDED = BENCHMARKS / "results" / "control"
DOCS = BENCHMARKS.parent / "docs"
BEGIN, END = "<!-- report: written by benchmarks/reproduction/report.py --docs -->", "<!-- report ends -->"
PLOT, CAPTION = "modes.png", "Scores of the control and of one checkpoint in three modes, and its speed"


def run(*command: object) -> None:
    """Run a command, its output passed on."""
    words = list(map(str, command))
    print(f"$ {' '.join(words)}", flush=True)
    subprocess.run(words, check=True)


def unmask(*arguments: object) -> None:
    """Run the command line."""
    run(Path(sys.executable).with_name("unmask"), *arguments)


def evaluate(model: str, options: argparse.Namespace, out: Path, *flags: object) -> None:
    """`unmask eval` on the test questions."""
    unmask("eval", "-m", model, "--suite", SUITE, "--limit", options.test, "--out", out, "--resume", *flags)


def results(script: str, options: argparse.Namespace, *flags: object) -> Any:
    """What a script of benchmarks/ writes about the drafting model, which it does unless an interrupted report has it."""
    folder = options.out / script
    if not list(folder.glob("*.json")):
        run(sys.executable, BENCHMARKS / f"{script}.py", "--model", options.drafting, "--results", folder, *flags)
    (path,) = folder.glob("*.json")
    return read_json(path)


def everyday(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of everyday.py, by section."""
    sections = results("everyday", options, "--per-kind", options.per_kind)["sections"]
    return {name: section["rows"] for name, section in sections.items()}


def llamacpp(options: argparse.Namespace) -> dict[str, float]:
    """What vs_llamacpp.py prints of our sides over llama.cpp's best quantisation, by side; nothing without a rival."""
    if options.llama_python is None:
        return {}
    figures = results("vs_llamacpp", options, "--llama-python", options.llama_python)["figures"]
    return {name: each["value"] for name, each in figures.items() if name.startswith("D1 ")}


def ways(options: argparse.Namespace) -> dict[str, SamplingParams]:
    """Decoding options of each mode; plain: `ar` without prompt lookup."""
    block = {"block_size": options.block_size, "threshold": options.threshold}
    return {
        "plain": SamplingParams(mode="ar", prompt_lookup=False),
        "ar": SamplingParams(mode="ar"),
        "speculative": SamplingParams(mode="speculative"),
        "diffusion": SamplingParams(mode="diffusion", **block),
    }


def modes(options: argparse.Namespace) -> dict[str, Any]:
    """Of each mode, the comparison with the control by task, and the speeds."""
    control, found = RECORDED, {}
    if options.control is not None:
        control = options.out / "control"
        evaluate(options.control, options, control, "--mode", "ar")
    for mode in MODES:
        block = ("--block-size", options.block_size, "--threshold", options.threshold) if mode == "diffusion" else ()
        evaluate(options.child, options, options.out / mode, "--mode", mode, *block)
        compared = compare_samples(load_samples(control), load_samples(options.out / mode))
        found[mode] = {task: asdict(each) for task, each in compared.items()}
    return {"against_control": found, "speeds": speeds(by_turns(options.child, ways(options), options.turns))}


def speeds(taken: Mapping[str, list[Answer]]) -> dict[str, dict[str, float]]:
    """Of each way tokens/s, tokens per forward, and the median of its tokens/s over those of plain, with its deciles."""
    found = {}
    for way, answers in taken.items():
        ratios = sorted(speed(one) / speed(plain) for one, plain in zip(answers, taken["plain"], strict=True) if plain.tokens)
        tokens = sum(each.tokens for each in answers)
        low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.1, 0.9))
        found[way] = {
            "tokens_per_second": tokens / sum(each.seconds for each in answers),
            "tokens_per_forward": tokens / sum(each.forwards for each in answers),
            **{"median": statistics.median(ratios), "p10": low, "p90": high, "items": len(ratios)},
        }
    return found


def describe(found: dict[str, Any]) -> list[str]:
    """The report in Markdown."""
    machine = found["environment"]
    beginning = f"{found['date']}, {machine['cpu']}, {machine['cores']} cores."
    return [beginning, "", *_everyday(found), *_llamacpp(found), "", *_modes(found)]


def _everyday(found: dict[str, Any]) -> list[str]:
    lines = [
        f"**The parent's own text, faster** (`{found['drafting']}`; against the same weights token by token without drafts, by "
        "turns, 8-bit, one request at a time, the prompt included):",
        "",
        "| prompts | of these | drafts from masks and text | from text alone | tokens per forward | texts identical |",
        "|---|---|---|---|---|---|",
    ]
    for section, rows in found["everyday"].items():
        best, text = rows["speculative all"], rows.get("ngrams all", rows["lookup all"])
        kinds = sorted(row["median_ratio"] for key, row in rows.items() if key.startswith("speculative ") and row is not best)
        lines.append(
            f"| {section} | {best['prompts']:.0f} "
            f"| **{best['median_ratio']:.2f}x** ({kinds[0]:.2f} to {kinds[-1]:.2f} by kind) "
            f"| {text['median_ratio']:.2f}x | {best['tokens_per_forward']:.2f} | {best['identical']:.0%} |"
        )
    return lines


def _llamacpp(found: dict[str, Any]) -> list[str]:
    sides = [f"{name.removeprefix('D1 ours, ')} {ratio:.2f}x" for name, ratio in found["llamacpp"].items() if _is_whole(name)]
    if not sides:
        return []
    return ["", f"Over llama.cpp's best quantisation of the same weights, all kinds of prompts together: {'; '.join(sides)}."]


def _is_whole(name: str) -> bool:
    """Whether a figure of vs_llamacpp.py is of all prompts together."""
    return not name.endswith(("everyday", "in-domain", "copying"))


def _modes(found: dict[str, Any]) -> list[str]:
    compared, by_way = found["against_control"], found["speeds"]
    whole = compared["ar"]["all"]
    items = by_way["plain"]["items"]
    lines = [
        f"**One checkpoint, three modes** (`{found['child']}`, all weights trained, against the control of as many tokens; "
        f"{whole['items']} test questions, the control scores {100 * whole['a']:.1f}):",
        "",
        "| mode | score | of the control's | difference (95%) | tokens per forward | tokens/s, over plain |",
        "|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        each, fast = compared[mode]["all"], by_way[mode]
        difference = each["difference"]
        low_high = f"{100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}"
        lines.append(
            f"| {mode} | {100 * each['b']:.1f} | **{each['b'] / max(each['a'], 1e-9):.3f}** | {100 * difference['value']:+.1f} "
            f"({low_high}) | {fast['tokens_per_forward']:.2f} | {fast['median']:.2f} ({fast['p10']:.2f} to {fast['p90']:.2f}) |"
        )
    lines += [
        "",
        f"Target of the first two: {TARGET}. Plain is mode ar without drafts from the text, "
        f"{by_way['plain']['tokens_per_second']:.0f} tokens/s; speeds are medians over {items:.0f} questions by turns, with "
        f"the 10th and 90th percentile. Mode diffusion: block size {found['block_size']}, threshold {found['threshold']:g}.",
        "",
        "",
        f"| task | control | {' | '.join(MODES)} |",
        "|---|---|---|---|---|",
    ]
    for task, row in compared["ar"].items():
        scores = " | ".join(f"{100 * compared[mode][task]['b']:.1f}" for mode in MODES)
        lines.append(f"| {task.removeprefix(f'{SUITE}/')} | {100 * row['a']:.1f} | {scores} |")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Scores by task, and tokens/s of the modes over plain."""
    import matplotlib.pyplot as plt

    compared = found["against_control"]
    tasks = list(compared["ar"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(2, 1))
    sides = {"control": [compared["ar"][task]["a"] for task in tasks]}
    sides |= {mode: [compared[mode][task]["b"] for task in tasks] for mode in MODES}
    for number, (side, scores) in enumerate(sides.items()):
        left.bar([place + 0.2 * number for place in range(len(tasks))], [100 * score for score in scores], 0.19, label=side)
    left.set_xticks([place + 0.3 for place in range(len(tasks))], [task.removeprefix(f"{SUITE}/") for task in tasks])
    left.set_ylabel("score")
    left.legend(fontsize=8)
    right.bar(MODES, [found["speeds"][mode]["median"] for mode in MODES], color=["C1", "C2", "C3"])
    right.axhline(1, color="black", linestyle=":")
    right.set_ylabel("tokens/s over plain, median")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def publish(lines: list[str], out: Path) -> None:
    """Put the report and its plot into the documentation."""
    page = DOCS / "reproduction.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    shutil.copyfile(out / PLOT, DOCS / "images" / f"reproduction-{PLOT}")
    page.write_text("\n".join([before + BEGIN, *lines, "", f"![{CAPTION}](images/reproduction-{PLOT})", END]) + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafting", default="smollm2-135m-diffusion", help="the model that drafts for its unmodified parent")
    parser.add_argument("--child", default="smollm2-135m-joint", help="the model converted in full")
    parser.add_argument("--control", help="[default: its answers as recorded]")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python [default: llama.cpp is not compared with]")
    parser.add_argument("--out", type=Path, default=Path("out/reproduction/report"))
    parser.add_argument("--per-kind", type=int, default=4, help="everyday prompts of each kind")
    parser.add_argument("--test", type=int, default=60, help="test questions per task")
    parser.add_argument("--turns", type=int, default=10, help="test questions per task that all modes are timed on by turns")
    parser.add_argument("--block-size", type=int, default=8, help="of mode diffusion")
    parser.add_argument("--threshold", type=float, default=0.9, help="of mode diffusion")
    parser.add_argument("--docs", action="store_true", help="write the report into docs/reproduction.md")
    options = parser.parse_args()
    if (options.out / "report.json").exists():  # a finished report is made anew, an interrupted one goes on
        shutil.rmtree(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    names = {key: getattr(options, key) for key in ("drafting", "child", "block_size", "threshold")}
    found = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "environment": environment(), **names}
    found |= {"everyday": everyday(options), "llamacpp": llamacpp(options), **modes(options)}
    atomic_write_json(options.out / "report.json", found)
    lines = describe(found)
    draw(found, options.out / PLOT)
    (options.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if options.docs:
        publish(lines, options.out)


if __name__ == "__main__":
    main()
