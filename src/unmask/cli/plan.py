"""`unmask plan`: memory, traffic, time and cost of a training run on GPUs that need not be there.

Owns the options and what is printed. The plans are `train.plan`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.console import make_console
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.train.parallel.dims import ParallelDims
    from unmask.train.plan.planner import Plan, Plans, Question

_LINES = 8
"""Reasons that are shown of each kind."""


def plan(
    recipe: Annotated[Path, typer.Option("--recipe", help="YAML file of the run.")],
    gpu: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100-80gb, h200 or b200.")] = "h100-80gb",
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, 8 to a node.")] = 8,
    layout: Annotated[
        str | None, typer.Option(metavar="NAME=N,...", help="Plan this layout only, in detail; `recipe`: that of the recipe.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, Hugging Face id or published model, instead of the recipe's.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the divided model on fake tensors, and compare.")] = False,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a GPU for an hour, in any currency.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a value of the recipe; may be repeated.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of memory and speed of all layouts to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a training run on many GPUs.

    \b
    unmask plan --recipe recipes/scale/llada2-flash_64_h100.yaml --gpu h100 --gpus 64
    unmask plan --recipe recipes/scale/llada2-mini_8_h200.yaml --gpu h200 --gpus 8 --layout recipe --check

    Every legal layout (data_replicate, data_shard, context, tensor, pipeline, expert), with activation checkpointing, full,
    selective and none: memory of a rank, traffic of a step, tokens in a day; fastest first. Memory is measured layer by
    layer, time is arithmetic; --check runs the code that would train.
    """
    from unmask.cli.info import find_config
    from unmask.train.parallel.dims import parse_layout
    from unmask.train.plan.gpus import find_gpu
    from unmask.train.plan.planner import Question, find_plans
    from unmask.train.recipe import load_recipe

    values = load_recipe(recipe, overrides or [])
    question = Question(values, find_config(model or values.model)[0], find_gpu(gpu), gpus, price)
    dims = None
    if layout is not None:
        dims = values.parallel.dims(gpus) if layout == "recipe" else parse_layout(layout, gpus)
    plans = find_plans(question, dims)
    if as_json:
        typer.echo(json.dumps(_facts(question, plans, _to_check(plans) if check else None)))
    else:
        _print_plans(question, plans, dims, top, check=check)
    if plot is not None:
        from unmask.train.plan.plot import plot_plans

        plot_plans(plans, question, plot)
        if not as_json:
            make_console().print(f"plot     {plot}", soft_wrap=True)


def _print_plans(question: Question, plans: Plans, dims: ParallelDims | None, top: int, *, check: bool) -> None:
    """Print the table of plans (with `dims` the plan of these, in detail), then a check: it takes long, and may fail."""
    shown = [*plans.fitting, *(plans.too_large if dims is not None else [])][:top]
    if not shown:
        raise ConfigError(_nothing_fits(question, plans))
    console = make_console()
    _print_table(console, question, shown)
    if dims is not None:
        _print_details(console, shown[0])
    else:
        _print_reasons(console, question, plans)
    if check:
        _print_check(console, question, shown[0])


def _to_check(plans: Plans) -> Plan | None:
    """The plan that is checked: the fastest or, if none fits, the nearest; None: there is none."""
    return next(iter([*plans.fitting, *plans.too_large]), None)


def _nothing_fits(question: Question, plans: Plans) -> str:
    from unmask.train.plan.planner import too_large

    if not plans.too_large:
        rule, count = plans.refused.most_common(1)[0]
        return f"no layout of {question.num_gpus} GPUs is legal; most often ({count}): {rule}"
    least = too_large(plans.too_large[0], question)
    return (
        f"nothing fits on {question.num_gpus} {question.gpu.name}; the least is {least}; use more or larger GPUs, or a lower "
        "train.micro_rows or data.row_length"
    )


def _facts(question: Question, plans: Plans, to_check: Plan | None) -> dict[str, Any]:
    from dataclasses import asdict

    from unmask.train.parallel.dims import layout_name
    from unmask.train.plan.check import check_plan
    from unmask.train.plan.planner import too_large

    checked = None
    if to_check is not None:
        checked = {"layout": layout_name(to_check.dims), **asdict(check_plan(question, to_check))}
    return {
        "gpu": asdict(question.gpu),
        "gpus": question.num_gpus,
        "efficiency": asdict(question.efficiency),
        "plans": [each.as_json() for each in plans.fitting],
        "too_large": [too_large(each, question) for each in plans.too_large],
        "refused": dict(plans.refused),
        "check": checked,
    }


def _print_table(console: Console, question: Question, plans: list[Plan]) -> None:
    from unmask.cli.tables import print_table
    from unmask.train.parallel.dims import layout_name
    from unmask.train.plan.gpus import GIB
    from unmask.train.plan.planner import CHECKPOINTING

    head = [
        "layout",
        "check-pointing",
        "rows",
        "GiB",
        "states",
        "gathered",
        "activations",
        "NVLink GB",
        "network GB",
        "s / step",
    ]
    head += ["MFU", "tokens / day", "days", *([] if question.price is None else ["cost"])]
    rows = []
    for each in plans:
        memory = each.memory
        states = memory.weights + memory.gradients + memory.optimizer
        cells = [layout_name(each.dims), CHECKPOINTING[each.recompute]]
        cells.append(f"{each.batch.micro_rows} x {each.batch.micro_batches}")
        sizes = (memory.total, states, memory.gathered, memory.activations + memory.logits)
        cells += [f"{size / GIB:.1f}" for size in sizes]
        cells += [f"{sum(link.values()) / 1e9:.1f}" for link in (each.nvlink, each.network)]
        cells += [f"{each.seconds:.2f}", f"{each.mfu:.0%}", f"{each.tokens_per_day / 1e9:.2f}e9", f"{each.days:.1f}"]
        rows.append(cells if each.cost is None else [*cells, f"{each.cost:,.0f}"])
    gpu, shares = question.gpu, question.efficiency
    print_table(
        console, head, rows, title=f"{question.num_gpus} x {gpu.name}, {gpu.memory / GIB:.0f} GiB each; bytes are of one GPU"
    )
    console.print(
        f"assumed: {shares.matrices:.0%} of the bfloat16 peak in matrix products, {shares.experts:.0%} in experts' and "
        f"{shares.attention:.0%} in attention; {shares.links:.0%} of links; {shares.memory:.0%} of memory to fill; balanced "
        "experts",
        soft_wrap=True,
    )


def _print_details(console: Console, plan: Plan) -> None:
    from unmask.train.plan.gpus import GIB

    parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in vars(plan.memory).items() if value)
    console.print(f"memory   {parts} GiB", soft_wrap=True)
    for name, links in (("NVLink", plan.nvlink), ("network", plan.network)):
        sent = ", ".join(f"{dimension} {value / 1e9:.1f}" for dimension, value in links.items() if value)
        console.print(f"{name:<8} {sent + ' GB in a step' if sent else 'nothing'}", soft_wrap=True)


def _print_reasons(console: Console, question: Question, plans: Plans) -> None:
    from unmask.train.plan.planner import too_large

    if plans.too_large:
        console.print(f"do not fit: {len(plans.too_large)}, the nearest first", soft_wrap=True)
    for each in plans.too_large[:_LINES]:
        console.print(f"  {too_large(each, question)}", soft_wrap=True)
    if plans.refused:
        console.print(f"not legal: {plans.refused.total()}", soft_wrap=True)
    for reason, count in plans.refused.most_common(_LINES):
        console.print(f"  {count} x {reason}", soft_wrap=True)


def _print_check(console: Console, question: Question, plan: Plan) -> None:
    """Check a plan and print what comes out."""
    from unmask.cli.tables import print_table
    from unmask.train.parallel.dims import layout_name
    from unmask.train.plan.check import check_plan
    from unmask.train.plan.gpus import GIB

    checked, rows = check_plan(question, plan), []
    for name, predicted, tracked, unit in checked.comparison():
        scale = {"GiB": GIB, "TFLOP": 1e12}[unit]
        rows.append(
            [f"{name}, {unit}", f"{predicted / scale:.2f}", f"{tracked / scale:.2f}", f"{predicted / tracked - 1:+.1%}"]
        )
    title = f"checked on fake tensors: one rank of {layout_name(plan.dims)}, {checked.seconds:.0f} s"
    print_table(console, ["", "predicted", "tracked", "difference"], rows, title=title)
