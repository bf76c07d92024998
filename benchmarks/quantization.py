"""What quantised weights cost in quality: how often the likeliest token stays the same, and perplexity, against float32.

    python benchmarks/quantization.py [--models smollm2-135m,...] [--weights int8,int4,bfloat16] [--count 30] [--json]

Two kinds of text: the model's own greedy answers (float32) to everyday prompts, where a changed likeliest token is a changed
answer, and prose that no model has written. Teacher-forced: an autoregressive model predicts each token from those before it,
a diffusion model from the blocks before it, its own block masked. Of a speculative model the parent is measured, whose text it
is. All weights see the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Figure, arguments, figure, print_json, results_path, write_results
from everyday import prompts_of
from floors import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

import unmask
from unmask.diffusion.objectives import ban_mask
from unmask.engine.backends.base import Backend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.engine.llm import LanguageModel
from unmask.engine.parent import parent_of

PROSE = Path(__file__).parents[1] / "docs" / "concepts.md"
LOG = Console(stderr=True, width=120)


@dataclass(frozen=True)
class Passage:
    """Token ids, of which those from `first` on are predicted."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Predictions:
    """For each predicted token: the likeliest token (int64 [N]) and the loss of the true one (float32 [N], nats)."""

    likeliest: Tensor
    losses: Tensor


def open_model(name: str, weights: str) -> LanguageModel:
    """The model with these weights; of one that drafts for its parent, the parent."""
    is_dtype = weights in ("float32", "bfloat16")
    model = unmask.load(name, dtype=weights if is_dtype else "float32", quantize="none" if is_dtype else weights)
    if model.config.gated_lora_rank is not None:
        model = parent_of(model, unmask.load(name).tokenizer).model
    model.backend()
    return model


def own_answers(model: LanguageModel, count: int, max_new_tokens: int) -> list[Passage]:
    """Prompts with the model's greedy answers."""
    passages = []
    for prompt in prompts_of("everyday", -(-count // 10))[:count]:
        ids = model.encode_chat(prompt.messages)
        passages.append(Passage((*ids, *model.generate_ids(ids, max_new_tokens=max_new_tokens)), len(ids)))
    return passages


def prose(model: LanguageModel, count: int, length: int) -> list[Passage]:
    """Windows of a text of this project's documentation."""
    ids = model.encode_prompt(PROSE.read_text(encoding="utf-8"), chat=False)
    starts = range(0, len(ids) - length, length)
    return [Passage(tuple(ids[start : start + length]), length // 4) for start in starts[:count]]


@torch.inference_mode()
def predict(backend: Backend, passage: Passage) -> Predictions:
    """Predictions of a passage's tokens, its own tokens before them given."""
    config, ids = backend.config, passage.ids
    if config.mask_id is None:
        hidden_TD = forward(backend, ids, 1)[passage.first - 1 : -1]
    else:
        size, mask_id = config.block_size or 32, config.mask_id
        parts = []
        for start in range(passage.first // size * size, len(ids), size):
            kept = max(start, passage.first)
            stop = min(start + size, len(ids))
            hidden = forward(backend, (*ids[:kept], *[mask_id] * (stop - kept)), size)
            parts.append(hidden[kept:stop])
        hidden_TD = torch.cat(parts)
    logits_NV = backend.logits(hidden_TD).float()
    if config.mask_id is not None:
        logits_NV = ban_mask(logits_NV, config.mask_id)
    targets_N1 = torch.tensor(ids[passage.first :])[:, None]
    return Predictions(logits_NV.argmax(-1), -logits_NV.log_softmax(-1).gather(1, targets_N1)[:, 0])


def forward(backend: Backend, ids: Sequence[int], block_size: int) -> Tensor:
    """Hidden states [T, D] of a sequence that attends block-causally."""
    kv_cache = backend.new_kv_cache(1, len(ids))
    return backend.forward(Batch([SequenceSlice(ids, 0, [0], block_size)], len(ids), backend.device), kv_cache)


def measure(name: str, weights: Sequence[str], count: int, length: int) -> dict[str, Figure]:
    """Agreement and perplexity of each kind of weights on both kinds of text, printed as a table."""
    reference = open_model(name, "float32")
    texts = {"own answers": own_answers(reference, count, length), "prose": prose(reference, count, 2 * length)}
    expected = {kind: [predict(reference.backend(), each) for each in passages] for kind, passages in texts.items()}
    table = Table("weights", "text", "tokens", "same likeliest token", "perplexity", "float32", "change", title=name)
    figures: dict[str, Figure] = {}
    for each in weights:
        backend = open_model(name, each).backend()
        for kind, passages in texts.items():
            found = [predict(backend, passage) for passage in passages]
            pairs = zip(found, expected[kind], strict=True)
            agreement = torch.cat([a.likeliest == b.likeliest for a, b in pairs]).float().mean().item()
            loss, before = (torch.cat([one.losses for one in all_]).mean().item() for all_ in (found, expected[kind]))
            change = math.exp(loss - before) - 1
            tokens = sum(len(passage.ids) - passage.first for passage in passages)
            perplexities = (f"{math.exp(value):.3f}" for value in (loss, before))
            table.add_row(each, kind, str(tokens), f"{agreement:.1%}", *perplexities, f"{change:+.2%}")
            figures[f"{name}, {each}, {kind}: agreement"] = figure(agreement)
            figures[f"{name}, {each}, {kind}: change of perplexity"] = figure(change)
    LOG.print(table)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", default="smollm2-135m,smollm2-135m-diffusion,smollm2-135m-converted")
    parser.add_argument("--weights", default="int8,int4,bfloat16")
    parser.add_argument("--count", type=int, default=30, help="texts of each kind")
    parser.add_argument(
        "--length", type=int, default=64, help="tokens of an answer, at most; a window of prose has twice as many"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    options = parser.parse_args(argv)
    if options.smoke:
        options.weights, options.count, options.length = "int8", 1, 16
    figures: dict[str, Figure] = {}
    for name in options.models.split(","):
        figures |= measure(name, options.weights.split(","), options.count, options.length)
    write_results(results_path(options.results, "quantization"), {"machine": machine(), "figures": figures})
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
