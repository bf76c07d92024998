"""The table and the plot of docs/scale.md: the fastest layout of LLaDA2.0-mini and -flash on 8, 64 and 512 GPUs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from unmask.models.families.registry import published_config, read_config
from unmask.train.parallel.dims import layout_name
from unmask.train.plan.gpus import GIB, find_gpu
from unmask.train.plan.planner import CHECKPOINTING, Plan, Question, find_plans
from unmask.train.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = {"mini": "llada2-mini_8_h200.yaml", "flash": "llada2-flash_64_h100.yaml"}
SIZES, GPUS = (8, 64, 512), ("a100-80gb", "h100-80gb", "h200", "b200")
HEAD = (
    "model",
    "GPUs",
    "fastest layout",
    "checkpointing",
    "rows",
    "GiB",
    "NVLink GB",
    "network GB",
    "s / step",
    "MFU",
    "1e9 tokens / day",
)


def best_plan(model: str, gpus: int, gpu: str) -> Plan | None:
    """The fastest plan that fits; None: there is none."""
    recipe = load_recipe(ROOT / "recipes" / "scale" / RECIPES[model], ["train.micro_rows=1"])
    question = Question(recipe, read_config(published_config(recipe.model)), find_gpu(gpu), gpus)
    return next(iter(find_plans(question).fitting), None)


def table_row(model: str, gpus: int, gpu: str, plan: Plan | None) -> str:
    """One line of the table."""
    if plan is None:
        return f"| {model} | {gpus} {gpu} | nothing fits |" + " |" * 8
    batch = plan.batch
    cells = [model, f"{gpus} {gpu}", f"`{layout_name(plan.dims)}`", CHECKPOINTING[plan.recompute]]
    cells += [f"{batch.micro_rows} x {batch.micro_batches}", f"{plan.memory.total / GIB:.0f}"]
    cells += [f"{sum(link.values()) / 1e9:.0f}" for link in (plan.nvlink, plan.network)]
    cells += [f"{plan.seconds:.2f}", f"{plan.mfu:.0%}", f"{plan.tokens_per_day / 1e9:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table and write the plot."""
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, 2), RECIPES, strict=True):
        for gpu in GPUS:
            plans = {gpus: best_plan(model, gpus, gpu) for gpus in SIZES}
            for gpus, plan in plans.items():
                print(table_row(model, gpus, gpu, plan), flush=True)
            points = [(gpus, plan.tokens_per_day / 1e9) for gpus, plan in plans.items() if plan is not None]
            axes.plot(*zip(*points, strict=True), marker="o", label=gpu)
        axes.set(title=f"LLaDA2.0-{model}", xscale="log", yscale="log", xlabel="GPUs", ylabel="1e9 tokens in a day, planned")
        axes.set_xticks(SIZES, [str(gpus) for gpus in SIZES])
        axes.legend()
    figure.savefig(ROOT / "docs" / "images" / "scale.svg")


if __name__ == "__main__":
    main()
