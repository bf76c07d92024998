"""`unmask convert`: train a block-diffusion model from an autoregressive one.

Owns the help text. Options, recipe and output are `cli.training`'s.
"""

from __future__ import annotations

from unmask.cli.training import Data, Model, Out, Overrides, RecipeFile, Resume, train


def convert(
    out: Out,
    recipe: RecipeFile = None,
    model: Model = None,
    data: Data = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Convert an autoregressive model to block diffusion.

    \b
    unmask convert --model smollm2-135m --data answers.jsonl --out out/mine
    unmask convert --data reasoning_gym:chain_sum --out out/sums --set train.tokens=20000
    unmask convert --recipe recipes/smollm2-135m_convert_cpu.yaml --out out/cpu
    unmask convert --out out/mine --resume

    A jsonl or parquet record holds "text", "messages", or "prompt" and "response". Ctrl-C saves a checkpoint and stops.
    """
    train("convert", out, recipe, model, data, overrides, resume)
