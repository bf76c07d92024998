"""Plot of plans: memory of a rank against tokens in a day, one point for each layout."""

from __future__ import annotations

from pathlib import Path

from unmask.train.parallel.dims import layout_name
from unmask.train.plan.gpus import GIB
from unmask.train.plan.planner import CHECKPOINTING, Plans, Question

_NAMED = 3


def plot_plans(plans: Plans, question: Question, path: Path) -> None:
    """Write the plot to `path`, in the format of its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (recompute, name), color in zip(CHECKPOINTING.items(), ("tab:orange", "tab:green", "tab:blue"), strict=True):
        kind = [plan for plan in (*plans.fitting, *plans.too_large) if plan.recompute == recompute]
        points = [plan.memory.total / GIB for plan in kind], [plan.tokens_per_day / 1e9 for plan in kind]
        axes.scatter(*points, s=14, color=color, label=f"checkpointing: {name}")
    room = question.gpu.memory * question.efficiency.memory / GIB
    axes.axvline(room, color="black", linewidth=1, label=f"room on {question.gpu.name}: {room:.0f} GiB")
    for plan in plans.fitting[:_NAMED]:
        axes.annotate(layout_name(plan.dims), (plan.memory.total / GIB, plan.tokens_per_day / 1e9), fontsize=7)
    axes.set(xscale="log", xlabel="memory of a rank, GiB", ylabel="tokens in a day, 1e9", ylim=(0, None))
    axes.set_title(f"{question.recipe.model} on {question.num_gpus} x {question.gpu.name}")
    axes.legend()
    figure.savefig(path)
