"""What quantised weights cost in quality: how often the likeliest token stays the same, and perplexity, against float32.

    python benchmarks/quantization.py [--models smollm2-135m,...] [--weights int8,int4,bfloat16] [--count 30] [--json]
    python benchmarks/quantization.py --models smollm2-135m-diffusion --weights int8,out/int4 --llama-python rival/bin/python

Two kinds of text: the model's own greedy answers (float32) to everyday prompts, where a changed likeliest token is a changed
answer, and prose that no model has written. Teacher-forced: an autoregressive model predicts each token from those before it,
a diffusion model from the blocks before it, its own block masked. Of a speculative model the parent is measured, whose text it
is. All weights see the same tokens.

Weights may be a folder that `unmask quantize` has made of the model. With `--llama-python`, a Python with llama-cpp-python
(see vs_llamacpp.py), llama.cpp predicts the same tokens, with the float32 weights rounded by its own quantiser.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Figure, arguments, figure, print_json, results_path, write_results
from everyday import prompts_of
from floors import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from vs_llamacpp import RIVAL, requantise

import unmask
from unmask.diffusion.objectives import ban_mask
from unmask.engine.backends.base import Backend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.engine.llm import LanguageModel
from unmask.engine.parent import parent_of
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.hub import resolve

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
    """The model with these weights, or those in a folder; of one that drafts for its parent, the parent."""
    is_dtype = weights in ("float32", "bfloat16")
    if Path(weights).is_dir():
        model = unmask.load(weights)
    else:
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


def llama_files(python: str, name: str, kinds: Sequence[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """GGUF files of the float32 weights of a model, or of its parent, rounded by llama.cpp to each kind."""
    source = folder / "float32.gguf"
    parent = ["--parent"] if read_model_config(resolve(name)).gated_lora_rank is not None else []
    exporting = [sys.executable, "-m", "unmask", "export", name, *parent, "--format", "gguf", "--type", "f32"]
    subprocess.run([*exporting, "--out", str(source)], check=True, stdout=subprocess.DEVNULL)
    for kind in kinds:
        requantise(python, kind, source, folder / f"{kind}.gguf")
        yield f"llama.cpp {kind}, {(folder / f'{kind}.gguf').stat().st_size / 1e6:.0f} MB", folder / f"{kind}.gguf"


def predict_by_llama(python: str, file: Path, passages: Sequence[Passage]) -> list[Predictions]:
    """What llama.cpp predicts of each passage."""
    asked = "".join(json.dumps({"ids": each.ids, "first": each.first}) + "\n" for each in passages)
    command = [python, str(RIVAL), "--predict", str(file)]
    told = subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return [Predictions(torch.tensor(one["likeliest"]), torch.tensor(one["losses"])) for one in map(json.loads, told)]


def predictions(
    name: str, weights: Sequence[str], passages: Sequence[Passage], llama: tuple[str, Sequence[str]] | None
) -> Iterator[tuple[str, list[Predictions]]]:
    """What each kind of weights predicts; `llama`: its Python and its kinds."""
    for each in weights:
        backend = open_model(name, each).backend()
        yield Path(each).name, [predict(backend, passage) for passage in passages]
    if llama is not None:
        python, kinds = llama
        with tempfile.TemporaryDirectory() as folder:
            for kind, file in llama_files(python, name, kinds, Path(folder)):
                yield kind, predict_by_llama(python, file, passages)


def measure(
    name: str, weights: Sequence[str], count: int, length: int, llama: tuple[str, Sequence[str]] | None
) -> dict[str, Figure]:
    """Agreement and perplexity of each kind of weights on both kinds of text, printed as a table; llama.cpp's where the model
    is autoregressive."""
    reference = open_model(name, "float32")
    texts = {"own answers": own_answers(reference, count, length), "prose": prose(reference, count, 2 * length)}
    passages = [passage for each in texts.values() for passage in each]
    expected = [predict(reference.backend(), each) for each in passages]
    table = Table("weights", "text", "tokens", "same likeliest token", "perplexity", "float32", "change", title=name)
    figures: dict[str, Figure] = {}
    for each, found in predictions(name, weights, passages, None if reference.config.mask_id is not None else llama):
        first = 0
        for kind, own in texts.items():
            part = slice(first, first + len(own))
            first += len(own)
            pairs = zip(found[part], expected[part], strict=True)
            agreement = torch.cat([a.likeliest == b.likeliest for a, b in pairs]).float().mean().item()
            loss, before = (torch.cat([one.losses for one in all_[part]]).mean().item() for all_ in (found, expected))
            change = math.exp(loss - before) - 1
            tokens = sum(len(passage.ids) - passage.first for passage in own)
            perplexities = (f"{math.exp(value):.3f}" for value in (loss, before))
            table.add_row(each, kind, str(tokens), f"{agreement:.1%}", *perplexities, f"{change:+.2%}")
            figures[f"{name}, {each}, {kind}: agreement"] = figure(agreement)
            figures[f"{name}, {each}, {kind}: change of perplexity"] = figure(change)
    LOG.print(table)
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", default="smollm2-135m,smollm2-135m-diffusion,smollm2-135m-converted")
    parser.add_argument("--weights", default="int8,int4,bfloat16", help="kinds, or folders of the quantised model")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--llama-kinds", default="Q8_0,Q4_K_M,Q4_0", help="of llama.cpp's quantiser")
    parser.add_argument("--count", type=int, default=30, help="texts of each kind")
    parser.add_argument(
        "--length", type=int, default=64, help="tokens of an answer, at most; a window of prose has twice as many"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    options = parser.parse_args(argv)
    if options.smoke:
        options.weights, options.count, options.length = "int8", 1, 16
    llama = None if options.llama_python is None else (options.llama_python, options.llama_kinds.split(","))
    figures: dict[str, Figure] = {}
    for name in options.models.split(","):
        figures |= measure(name, options.weights.split(","), options.count, options.length, llama)
    write_results(results_path(options.results, "quantization"), {"machine": machine(), "figures": figures})
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
