"""Reports of comparisons and sweeps: Markdown, one HTML file, plots.

Owns their format. Every number comes from `compare` and `runner`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from unmask.eval.compare import Comparison, Interval
from unmask.files import atomic_write, atomic_write_json, bytes_writer

_PAGE = """\
<!doctype html><html lang=en><meta charset=utf-8><title>Comparison</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;border-bottom:1px solid #8886;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}
</style><h1>{{ title }}</h1>{% for note in notes %}<p>{{ note }}</p>{% endfor %}
<table><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<img alt="Scores and speed" src="data:image/png;base64,{{ image }}"><p>{{ legend }}</p></html>
"""
_LEGEND = (
    "Intervals are paired bootstrap over items, 10,000 resamples. In the row `all` every task has the same weight. McNemar's "
    "test compares the items that only one side has right."
)


def write_comparison(
    folder: Path, comparisons: Mapping[str, Comparison], a: Mapping[str, Any], b: Mapping[str, Any]
) -> dict[str, Path]:
    """Write report.md, report.html, comparison.json and the plot.

    Args:
        folder: created.
        comparisons: from `compare_samples`.
        a, b: content of the two runs' `results.json`.

    Returns:
        File name -> path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = [comparison_row(task, each) for task, each in comparisons.items()]
    head, rows = list(cells[0]), [list(row.values()) for row in cells]
    plot = folder / "comparison.png"
    draw_comparison(comparisons, plot, a["model"]["name"], b["model"]["name"])
    title = f"{b['model']['name']} against {a['model']['name']}"
    notes = [_about("A", a), _about("B", b), _limits(a, b)]
    text = [f"# {title}", *notes, markdown_table(head, rows), f"![Scores and speed]({plot.name})", _LEGEND]
    image = base64.b64encode(plot.read_bytes()).decode()
    page = jinja2.Template(_PAGE, autoescape=True).render(
        title=title, notes=notes, head=head, rows=rows, image=image, legend=_LEGEND
    )
    atomic_write(folder / "report.md", bytes_writer(("\n\n".join(text) + "\n").encode()))
    atomic_write(folder / "report.html", bytes_writer(page.encode()))
    atomic_write_json(
        folder / "comparison.json",
        {"a": dict(a), "b": dict(b), "tasks": {task: asdict(each) for task, each in comparisons.items()}},
    )
    return {name: folder / name for name in ("report.md", "report.html", "comparison.json", plot.name)}


def comparison_row(task: str, each: Comparison) -> dict[str, str]:
    """Column -> cell of a task's row in the table."""
    return {
        "task": task,
        "items": str(each.items),
        "score of A": f"{100 * each.a:.1f}",
        "score of B": f"{100 * each.b:.1f}",
        "B - A (95%)": _interval(each.difference, 100, "+.1f"),
        "only A right": str(each.only_a),
        "only B right": str(each.only_b),
        "McNemar p": "< 0.001" if each.p_value < 0.001 else f"{each.p_value:.3f}",
        "tokens/s, B / A (95%)": _interval(each.speed, 1, ".2f"),
        "tokens per forward, B / A": f"{each.forwards.value:.2f}",
    }


def draw_comparison(comparisons: Mapping[str, Comparison], path: Path, name_a: str, name_b: str) -> None:
    """Plot scores side by side, and the ratios of speed with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 + 0.1 * len(comparisons)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = list(range(len(comparisons)))[::-1]
    for shift, side, name in ((0.2, "a", name_a), (-0.2, "b", name_b)):
        left.barh([row + shift for row in rows], [100 * getattr(each, side) for each in comparisons.values()], 0.36, label=name)
    left.set_yticks(rows, list(comparisons))
    left.set_xlabel("score")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize="small")
    speeds = [each.speed for each in comparisons.values()]
    bounds = [[max(0.0, s.value - s.low) for s in speeds], [max(0.0, s.high - s.value) for s in speeds]]
    right.errorbar([s.value for s in speeds], rows, xerr=bounds, fmt="o", capsize=3, color="C2")
    right.axvline(1.0, color="grey", linewidth=1)
    right.set_xlabel("tokens/s, B / A")
    figure.savefig(path, dpi=130)


def draw_frontier(points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Score over tokens per forward, a line for each block size: Figure 4 of the LLaDA2.0 report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for size in sorted({point["block_size"] for point in points}):
        own = sorted((point for point in points if point["block_size"] == size), key=lambda point: point["threshold"])
        axes.plot([p["tokens_per_forward"] for p in own], [100 * p["score"] for p in own], "o-", label=f"block {size}")
        for point in own:
            at = (point["tokens_per_forward"], 100 * point["score"])
            axes.annotate(f"{point['threshold']:g}", at, textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    axes.set_xlabel("tokens per forward, every forward counted")
    axes.set_ylabel("score")
    axes.set_title(title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _about(side: str, results: Mapping[str, Any]) -> str:
    model, settings, where = results["model"], results["settings"], results["environment"]
    kind = "diffusion" if model["diffusion"] else "autoregressive"
    decoding = ", ".join(f"{name} {value}" for name, value in settings["decoding"].items()) or "defaults"
    precision = model["dtype"] if model["quantize"] == "none" else model["quantize"]
    routing = "" if model["expert_capacity"] is None else f", {model['expert_capacity']} experts a block"
    packages = ", ".join(f"{name} {where['packages'].get(name)}" for name in ("unmask", "torch"))
    return (
        f"{side} is {model['name']} ({kind}, weights {model['weights'][:12]} in {precision}{routing}), decoding: {decoding}, "
        f"batch {settings['batch']}; {where['cpu']}, {where['threads']} threads, {packages}."
    )


def _limits(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    limited = {name for results in (a, b) for name, task in results["tasks"].items() if task["limited"] and task["size"]}
    if limited:
        return f"Not every item was answered of: {', '.join(sorted(limited))}."
    return "Every item of these tasks was answered, or as many as asked for where there is no end of them."


def _interval(value: Interval, scale: float, layout: str) -> str:
    return f"{value.value * scale:{layout}} ({value.low * scale:{layout}} to {value.high * scale:{layout}})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
