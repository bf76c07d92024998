"""Loss curves of layouts of processes against one process: the same recipe, step by step, and the largest difference.

Usage: python scripts/loss_compare.py RECIPE data_shard=2 data_shard=2,tensor=2 --steps 10 --plot curves.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

from unmask.train.metrics import read_metrics
from unmask.train.parallel.dims import ParallelDims, parse_layout
from unmask.train.parallel.launch import Launcher
from unmask.train.recipe import Recipe, load_recipe
from unmask.train.run import run_recipe

Curve = dict[int, float]
"""Loss (nats) by step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("layouts", nargs="+", help="such as data_shard=2 or data_replicate=2,data_shard=2")
    parser.add_argument("--steps", type=int, help="optimiser steps [default: the whole recipe]")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change a value of the recipe")
    parser.add_argument("--plot", type=Path, help="picture of all curves and their differences")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.set)
    layouts = {text: parse_layout(text) for text in options.layouts}
    with tempfile.TemporaryDirectory() as folder:
        curves = loss_curves(recipe, {"one process": ParallelDims(), **layouts}, Path(folder), options.steps)
    for line in table(curves):
        print(line)
    if options.plot:
        plot(curves, options.plot)


def loss_curves(
    recipe: Recipe, layouts: Mapping[str, ParallelDims], folder: Path, steps: int | None = None
) -> dict[str, Curve]:
    """The losses of the recipe on each layout, by its name; runs are left in `folder`."""
    return {name: _curve(recipe, dims, folder / str(number), steps) for number, (name, dims) in enumerate(layouts.items())}


def _curve(recipe: Recipe, dims: ParallelDims, out: Path, steps: int | None) -> Curve:
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=vars(dims))})
    if dims.size == 1:
        _train(lambda: False, recipe, out, steps)
    else:
        Launcher(dims.size, max_restarts=0, logs=out / "logs").run(_train, recipe, out, steps)
    return {r["step"]: r["loss"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"}


def _train(should_stop: Callable[[], bool], recipe: Recipe, out: Path, steps: int | None) -> None:
    done = count(1)
    run_recipe(recipe, out, should_stop=lambda: next(done) == steps or should_stop())


def largest_difference(curve: Curve, reference: Curve) -> float:
    """The largest difference of two curves (nats); raises ValueError when they are not of the same steps."""
    if curve.keys() != reference.keys():
        raise ValueError(f"curves of {len(curve)} and {len(reference)} steps cannot be compared")
    return max(abs(curve[step] - reference[step]) for step in reference)


def table(curves: Mapping[str, Curve]) -> Iterator[str]:
    """Lines: the first curve's losses, and the differences of the others from it."""
    (name, reference), *others = curves.items()
    width = max(12, *(len(other) for other, _ in others)) + 2
    yield f"{'step':>6}{name:>{width}}" + "".join(f"{other:>{width}}" for other, _ in others)
    for step, loss in reference.items():
        differences = [curve.get(step, float("nan")) - loss for _, curve in others]
        yield f"{step:>6}{loss:>{width}.6f}" + "".join(f"{difference:>+{width}.1e}" for difference in differences)
    largest = [largest_difference(curve, reference) for _, curve in others]
    yield f"{'largest':>{6 + width}}" + "".join(f"{difference:>{width}.1e}" for difference in largest)


def plot(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw the losses, and below them the differences from the first curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), constrained_layout=True)
    (first, reference), *others = curves.items()
    top.plot(list(reference), list(reference.values()), label=first, linewidth=3, color="0.7")
    for name, curve in others:
        top.plot(list(curve), list(curve.values()), label=name)
        bottom.plot(list(curve), _differences(curve, reference), label=name)
    top.set_ylabel("nats per token")
    top.legend(fontsize="small")
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _differences(curve: Curve, reference: Curve) -> Sequence[float]:
    return [loss - reference[step] for step, loss in curve.items()]


if __name__ == "__main__":
    main()
