"""The layout of a run: that of its recipe or, with `parallel: auto`, one that is chosen for the processes at hand.

Owns the choice. On a GPU that plans are made for it is the planner's; elsewhere a rule.
"""

from __future__ import annotations

import json
from functools import cache
from math import gcd

from unmask.models.arch.config import ModelConfig
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.hub import resolve
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.gpus import Gpu
from unmask.train.plan.work import is_planned
from unmask.train.recipe import Recipe, parse_recipe


def layout_of(recipe: Recipe, num_processes: int, gpu: Gpu | None) -> ParallelDims:
    """The layout of a run of so many processes.

    Args:
        recipe: with its `parallel` section.
        num_processes: of the run.
        gpu: that each of them computes on; None: a CPU, or a GPU that plans are not made for.

    Raises:
        ConfigError: the recipe's layout makes another number of processes, or no layout fits.
    """
    if not recipe.parallel.auto or num_processes == 1:
        return recipe.parallel.dims(num_processes)
    return _chosen(recipe.model_dump_json(), num_processes, gpu)


@cache
def _chosen(text: str, num_processes: int, gpu: Gpu | None) -> ParallelDims:
    """`layout_of` by the planner, which takes seconds for many GPUs."""
    recipe = parse_recipe(json.loads(text), "of the run")
    config = read_model_config(resolve(recipe.model))
    if gpu is not None and is_planned(recipe):
        # Imported here: it measures on fake tensors.
        from unmask.train.plan.planner import Question, fastest_layout

        return fastest_layout(Question(recipe, config, gpu, num_processes))
    return divided_rows(recipe, config, num_processes)


def divided_rows(recipe: Recipe, config: ModelConfig, num_processes: int) -> ParallelDims:
    """The rule: FSDP over as many ranks as divide a step's rows, context ranks for the rest.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    units = recipe.train.batch_rows // (2 if recipe.objective.pairs else 1)
    data_shard = gcd(units, num_processes)
    dims = ParallelDims(data_shard=data_shard, context=num_processes // data_shard)
    dims.check_model(config)
    return dims
