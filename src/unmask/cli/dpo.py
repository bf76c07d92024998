"""`unmask dpo`: preference optimisation of a diffusion model.

Owns the help text. Options, recipe and output are `cli.training`'s.
"""

from __future__ import annotations

from unmask.cli.training import Data, Model, Out, Overrides, RecipeFile, Resume, train


def dpo(
    out: Out,
    recipe: RecipeFile = None,
    model: Model = None,
    data: Data = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Make a diffusion model prefer one answer over another (DPO over the ELBO).

    \b
    unmask dpo --model out/chat --data preferences.jsonl --out out/aligned
    unmask dpo --data preferences.jsonl --out out/lora --set train.lora='{rank: 16, train_embedding: false}'
    unmask dpo --out out/aligned --resume

    A record holds "chosen" and "rejected", with or without "prompt": texts or lists of messages. The reference is a frozen copy
    of the model, or, with LoRA, the model without its adapter.
    """
    train("dpo", out, recipe, model, data, overrides, resume)
