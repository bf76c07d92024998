"""What block routing costs in quality: an upcycled model with experts that differ, its blocks kept to fewer and fewer of them.

    python scripts/block_routing.py [--model smollm2-135m] [--experts 16] [--active 4] [--groups 4] [--noise 0.1,0.3]
        [--capacities 16,12,8,6,4] [--windows 4] [--json]

The dense model becomes a mixture (`upcycle.py`) whose experts are its feed-forward plus noise, and routers are random. It reads
windows of this project's documentation, token by token given those before it, while tokens are routed in blocks of 32, as a
block decoder's are. Beside the mixture's own predictions, groups and all: how often the likeliest token stays the same, the
change of perplexity, and how many experts a block uses in a layer. A mixture that was trained with block routing loses less.

Legend: T tokens, V vocabulary, N routed tokens, E experts, A active ones.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from upcycle import Upcycling, upcycled

import unmask
from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.moe import MoE, TokenBlocks
from unmask.models.arch.transformer import Transformer, reconfigured

PROSE = Path(__file__).parents[1] / "docs" / "concepts.md"
BLOCK, WINDOW = 32, 256
LOG = Console(stderr=True, width=120)


@dataclass(frozen=True)
class Predictions:
    """Of all windows: the likeliest tokens (int64 [N]), the losses of the true ones (float32 [N], nats), and the mean number of
    experts that a block uses in a layer."""

    likeliest: Tensor
    losses: Tensor
    experts: float


@dataclass(frozen=True)
class Cost:
    """Of a mixture with block routing, beside the same one without; `capacity` None: without, beside the dense model."""

    noise: float
    capacity: int | None
    same_likeliest: float
    change_of_perplexity: float
    experts: float


def windows(model: LanguageModel, count: int) -> list[list[int]]:
    """Windows of a text that no model has written."""
    ids = model.encode_prompt(PROSE.read_text(encoding="utf-8"), chat=False)
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, WINDOW)][:count]


@torch.inference_mode()
def predict(model: Transformer, texts: Sequence[Sequence[int]]) -> Predictions:
    """Next-token predictions."""
    used: list[int] = []
    for block in model.blocks:
        if isinstance(block.mlp, MoE):
            block.mlp.observer = partial(_count_experts, used)
    likeliest, losses = [], []
    for text in texts:
        tokens = torch.tensor([text])
        positions = torch.arange(len(text))
        causal = DenseAttend(torch.ones(1, len(text), len(text), dtype=torch.bool).tril())
        blocks = TokenBlocks(positions // BLOCK, -(-len(text) // BLOCK)) if model.config.moe else None
        logits_TV = model.head(model(tokens, positions[None], causal, token_blocks=blocks))[0, :-1]
        likeliest.append(logits_TV.argmax(-1))
        losses.append(-logits_TV.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0])
    return Predictions(torch.cat(likeliest), torch.cat(losses), sum(used) / max(len(used), 1))


def _count_experts(used: list[int], logits_NE: Tensor, indices_NA: Tensor) -> None:
    used += [len(block.unique()) for block in indices_NA.split(BLOCK)]


def cost(noise: float, capacity: int | None, found: Predictions, expected: Predictions) -> Cost:
    """The cost of what was found beside what is expected."""
    same = (found.likeliest == expected.likeliest).float().mean().item()
    return Cost(noise, capacity, same, math.exp((found.losses.mean() - expected.losses.mean()).item()) - 1, found.experts)


def measure(
    model: LanguageModel, upcycling: Upcycling, capacities: Sequence[int], texts: Sequence[Sequence[int]]
) -> list[Cost]:
    """Costs of one mixture."""
    mixture = upcycled(model.transformer, upcycling)
    own = predict(mixture, texts)
    costs = [cost(upcycling.noise, None, own, predict(model.transformer, texts))]
    for capacity in capacities:
        limited = reconfigured(mixture, mixture.config.with_expert_capacity(capacity))
        costs.append(cost(upcycling.noise, capacity, predict(limited.eval(), texts), own))
    return costs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="dense and autoregressive")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--active", type=int, default=4, help="experts of a token")
    parser.add_argument("--groups", type=int, default=4, help="half of them are eligible for a token, without block routing")
    parser.add_argument("--noise", default="0.1,0.3", help="differences of experts, relative to their weights")
    parser.add_argument("--capacities", default="16,12,8,6,4", help="experts of a block")
    parser.add_argument("--windows", type=int, default=4, help=f"texts of {WINDOW} tokens")
    parser.add_argument("--json", action="store_true", help="print the costs as one list")
    options = parser.parse_args(argv)
    model = unmask.load(options.model, dtype="float32")
    if model.is_diffusion:
        raise ConfigError(f"{options.model} is a diffusion model; take an autoregressive one")
    texts, costs = windows(model, options.windows), list[Cost]()
    for noise in map(float, options.noise.split(",")):
        upcycling = Upcycling(
            family="bailing_moe_v2",
            num_experts=options.experts,
            num_active=options.active,
            num_groups=options.groups,
            noise=noise,
        )
        costs += measure(model, upcycling, list(map(int, options.capacities.split(","))), texts)
    table = Table("noise", "experts of a block, at most", "used", "same likeliest token", "change of perplexity")
    for each in costs:
        limit = "any (beside the dense model)" if each.capacity is None else str(each.capacity)
        table.add_row(
            f"{each.noise:g}", limit, f"{each.experts:.1f}", f"{each.same_likeliest:.1%}", f"{each.change_of_perplexity:+.2%}"
        )
    LOG.print(table)
    if options.json:
        print(json.dumps([asdict(each) for each in costs]))


if __name__ == "__main__":
    main()
